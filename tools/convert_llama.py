"""Dense LLaMA -> Mixture of Experts -> Hugging Face.

    python tools/convert_llama.py partition --source SmolLM2 --output moe --num-experts 8
    python tools/convert_llama.py export --source runs/moe --output moe-hf

A source is a Hugging Face directory, a GGUF file, or a checkpoint or run of this project. Each
command compares logits before it says done.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import tyro

from megatron_ext.commands.dense import Import
from megatron_ext.commands.export import Export
from megatron_ext.commands.inspect import Inspect
from megatron_ext.commands.merge import Merge
from megatron_ext.commands.partition import Partition
from megatron_ext.commands.report import Report
from megatron_ext.commands.scale import Scale
from megatron_ext.commands.upcycle import Upcycle
from megatron_ext.commands.upit import Upit
from megatron_ext.errors import hide_known_warnings, run_main

Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Partition, tyro.conf.subcommand("partition")]
    | Annotated[Upcycle, tyro.conf.subcommand("upcycle")]
    | Annotated[Upit, tyro.conf.subcommand("upit")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Scale, tyro.conf.subcommand("scale")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main() -> None:
    hide_known_warnings()
    # torch asks for huge pages: for tensors used once, page faults would cost as much as reading.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    command: Any = tyro.cli(Command, description=__doc__)  # type: ignore[call-overload]
    command.run()


if __name__ == "__main__":
    run_main(main)
