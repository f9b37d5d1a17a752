"""Dense LLaMA -> Mixture of Experts -> Hugging Face.

    python tools/convert_llama.py partition --source SmolLM2 --output moe --num-experts 8
    python tools/convert_llama.py export --source runs/moe --output moe-hf

A source is a Hugging Face directory, a GGUF file, or a checkpoint or run of this project. Each
command compares logits before it says done.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megatron_ext.errors import UserError, run_main

if TYPE_CHECKING:
    from megatron_ext.checkpoint.tensors import Weights

# Heavy imports are inside the functions: --help and mistakes answer at once, and processes that
# megatron-core spawns import this file again.


@dataclass
class Import:
    """Turn a dense LLaMA into a checkpoint that is loaded on any grid."""

    source: Path
    """Hugging Face directory with safetensors, or GGUF file."""
    output: Path
    """Directory of the new checkpoint."""
    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Type of the stored weights."""
    tokenizer: Path | None = None
    """Directory of the tokenizer's files; none: the source's own."""
    force: bool = False
    """Replace a model that is in the output directory."""
    skip_verify: bool = False
    """Do not compare with transformers' model (which takes the memory of two fp32 models)."""


@dataclass
class Partition:
    """Cut a dense LLaMA's FFNs into experts."""

    source: Path
    """Hugging Face directory, GGUF file, or dense checkpoint."""
    output: Path
    """Directory of the new checkpoint."""
    num_experts: int = 8
    """Experts E of a layer; a divisor of the FFN's width."""
    moe_router_topk: int = 2
    """Experts k that a token is sent to."""
    method: Literal["independent_random", "contiguous"] = "independent_random"
    """How neurons are dealt to experts."""
    seed: int = 1234
    """Of the neurons' deal and the routers' start."""
    moe_gate: Literal["linear", "mlp"] = "linear"
    """Router; `mlp` is LLaMA-MoE's, and cannot be exported to transformers."""
    score_scale: float | None = None
    """Factor on the chosen experts' outputs; none: E/k, as LLaMA-MoE."""
    router_init: Literal["normal", "zero"] = "normal"
    """Start of the routers' weights."""
    router_init_std: float = 0.02
    """Standard deviation of a normal start."""
    moe_dense_first_layers: int = 0
    """How many of the first layers stay dense."""
    moe_dense_last_layers: int = 0
    """How many of the last layers stay dense."""
    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Type of the stored weights."""
    tokenizer: Path | None = None
    """Directory of the tokenizer's files; none: the source's own."""
    force: bool = False
    """Replace a model that is in the output directory."""
    skip_verify: bool = False
    """Do not compare with the dense model (which takes the memory of one fp32 model)."""


@dataclass
class Export:
    """Turn a checkpoint or run into a Hugging Face directory that needs no custom code."""

    source: Path
    """Checkpoint or run directory."""
    output: Path
    """Directory of the Hugging Face model."""
    iteration: int | None = None
    """Iteration of a run; none: the latest."""
    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Type of the exported weights."""
    max_shard_size: float = 2.0
    """Largest weight file in GB; one file is in memory at a time."""
    tokenizer: Path | None = None
    """Directory of the tokenizer's files; none: those of the checkpoint."""
    force: bool = False
    """Replace a model that is in the output directory."""
    skip_verify: bool = False
    """Do not compare with transformers' model (which takes the memory of two fp32 models)."""


@dataclass
class Inspect:
    """Show what a model is made of."""

    source: Path
    """Checkpoint, run, Hugging Face directory or GGUF file."""


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Partition, tyro.conf.subcommand("partition")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def run_import(options: Import) -> None:
    from megatron_ext.checkpoint import layout, verify
    from megatron_ext.checkpoint.hf import HfWeights, open_weights

    _check_paths(options.source, options.output, options.force)
    weights = open_weights(options.source)
    if not isinstance(weights, HfWeights):
        raise UserError(f"{options.source} is a checkpoint already")
    with layout.staged_directory(options.output, options.force) as folder:
        _write(folder, options, weights)
        if not options.skip_verify:
            error = verify.check_import(options.source, folder)
            print(f"logits against transformers: relative error {error:.1e}")
    _done(options.output)


def run_partition(options: Partition) -> None:
    from megatron_ext.checkpoint import experts, layout, verify
    from megatron_ext.checkpoint.hf import open_weights
    from megatron_ext.construction.partition import METHODS

    _check_paths(options.source, options.output, options.force)
    if options.seed < 0:
        raise UserError(f"seed={options.seed} must not be negative")
    dense = open_weights(options.source)
    scale = options.score_scale
    model = dataclasses.replace(
        dense.model,
        num_experts=options.num_experts,
        moe_router_topk=options.moe_router_topk,
        moe_score_scale=options.num_experts / options.moe_router_topk if scale is None else scale,
        moe_gate=options.moe_gate,
        moe_dense_first_layers=options.moe_dense_first_layers,
        moe_dense_last_layers=options.moe_dense_last_layers,
    )
    deal = METHODS[options.method]
    neurons = {
        layer: deal(model.ffn_hidden_size, options.num_experts, options.seed, layer)
        for layer in model.moe_layers
    }
    router = {"gate": options.moe_gate, "init": options.router_init, "std": options.router_init_std}
    weights = experts.PartitionedWeights(
        dense, model, neurons, options.seed, options.router_init, options.router_init_std
    )
    with layout.staged_directory(options.output, options.force) as folder:
        source = {"name": options.source.name, "fingerprint": experts.fingerprint(dense)}
        layout.write_construction(
            folder, experts.describe(options.method, options.seed, neurons, router, source)
        )
        _write(folder, options, weights)
        if not options.skip_verify:
            error = verify.check_partition(dense, folder)
            print(f"all experts together against the dense model: relative error {error:.1e}")
            print("weights put back together: equal bit by bit")
    _done(options.output)


def run_export(options: Export) -> None:
    from megatron_ext.checkpoint import export, layout, verify
    from megatron_ext.checkpoint.reader import CheckpointWeights
    from megatron_ext.checkpoint.tensors import DTYPES

    _check_paths(options.source, options.output, options.force)
    checkpoint = CheckpointWeights(options.source, options.iteration)
    export.architecture(checkpoint.model)
    dtype = DTYPES.get(options.dtype, checkpoint.dtype)
    tokenizer = options.tokenizer or options.source / layout.TOKENIZER_DIR
    with layout.staged_directory(options.output, options.force) as folder:
        copied = layout.copy_tokenizer(tokenizer, folder)
        settings = folder / layout.GENERATION_FILE
        token_ids = json.loads(settings.read_text()) if settings.is_file() else {}
        export.export(checkpoint, folder, dtype, int(options.max_shard_size * 1e9), token_ids)
        if not any(name.startswith("tokenizer") for name in copied):
            print(
                f"no tokenizer in {tokenizer}: add its files, or name their place with --tokenizer"
            )
        if not options.skip_verify:
            error = verify.check_export(checkpoint, folder, dtype)
            print(f"transformers' logits against the checkpoint: relative error {error:.1e}")
    _done(options.output)


def run_inspect(options: Inspect) -> None:
    from megatron_ext.checkpoint.hf import open_weights
    from megatron_ext.checkpoint.inspection import report

    print(report(options.source, open_weights(options.source)))


def _check_paths(source: Path, output: Path, force: bool) -> None:
    from megatron_ext.checkpoint.layout import check_output

    if not source.exists():
        raise UserError(f"source {source} does not exist")
    if output.resolve() == source.resolve():
        raise UserError("source and output are the same directory", "name another output")
    check_output(output, force)


def _write(folder: Path, options: Import | Partition, weights: Weights) -> None:
    """Everything of a checkpoint directory but construction.json."""
    from megatron_ext.checkpoint import layout
    from megatron_ext.checkpoint.tensors import DTYPES
    from megatron_ext.checkpoint.writer import write_weights

    layout.write_model_config(folder, weights.model)
    _write_tokenizer(options.source, options.tokenizer, folder / layout.TOKENIZER_DIR)
    dtype = DTYPES.get(options.dtype)
    write_weights(layout.iteration_dir(folder, 0), weights, dtype, f"writing {options.output.name}")
    layout.write_latest(folder, 0)


def _write_tokenizer(source: Path, chosen: Path | None, target: Path) -> None:
    """Keep tokenizer and generation settings beside the weights."""
    from megatron_ext.checkpoint import layout

    own = source / layout.TOKENIZER_DIR
    place = chosen or (own if own.is_dir() else source)
    if place.is_dir():
        copied = layout.copy_tokenizer(place, target)
        if chosen and not any(name.startswith("tokenizer") for name in copied):
            raise UserError(f"{chosen} holds no tokenizer files")
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name).save_pretrained(target)
    if not (target / layout.GENERATION_FILE).is_file():
        settings = _token_ids(source)
        layout.write_text(target / layout.GENERATION_FILE, json.dumps(settings, indent=2) + "\n")


def _token_ids(source: Path) -> dict[str, Any]:
    """Begin, end and padding tokens as the source's configuration names them."""
    from megatron_ext.checkpoint.sources import GgufSource, read_hf_config

    if (source / "config.json").is_file():
        config = read_hf_config(source)
    elif source.is_file():
        config = GgufSource(source).config
    else:
        config = {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _done(output: Path) -> None:
    print(f"done: {output}")


def main() -> None:
    # megatron-core on missing GPU libraries, torch on saving from one process: nothing to act on.
    for module in ("megatron", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module)
    command: Any = tyro.cli(Command, description=__doc__)  # type: ignore[call-overload]
    runners: dict[type, Any] = {
        Import: run_import,
        Partition: run_partition,
        Export: run_export,
        Inspect: run_inspect,
    }
    runners[type(command)](command)


if __name__ == "__main__":
    run_main(main)
