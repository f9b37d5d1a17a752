"""A checkpoint again, with other routers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import ROUTER, layer_key
from megatron_ext.checkpoint.writer import write_weights

REPORT_FILE = "router_init.json"


class NewRouters:
    """The weights of a checkpoint, but for its routers (`tensors.Weights`).

    Args:
        vectors: [E, h] of every MoE layer, numbered from 0.
    """

    def __init__(self, source: CheckpointWeights, vectors: Mapping[int, Tensor]) -> None:
        self.source, self.model, self.dtype = source, source.model, source.dtype
        self._routers = {layer_key(layer, ROUTER): rows for layer, rows in vectors.items()}

    def tensor(self, key: str) -> Tensor:
        return self._routers[key] if key in self._routers else self.source.tensor(key)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.source.gate_up(layer)


def write_rerouted(
    source: CheckpointWeights,
    output: Path,
    vectors: Mapping[int, Tensor],
    report: dict[str, Any],
    force: bool = False,
) -> None:
    """Write a new checkpoint directory, which appears when it is complete.

    Args:
        vectors: [E, h] of every MoE layer, numbered from 0.
        report: JSON values for router_init.json; its `options` go into construction.json too.

    Raises:
        UserError: the output is there already; a vector is not finite; the disk is too small.
    """
    with layout.staged_directory(output, force) as folder:
        layout.copy_companions(source.path, folder)
        construction = layout.read_construction(source.path)
        if construction is not None:
            router = {"gate": "linear", "init": "trained", **report["options"]}
            layout.write_construction(folder, {**construction, "router": router})
        layout.write_text(folder / REPORT_FILE, json.dumps(report, indent=1) + "\n")
        weights = NewRouters(source, vectors)
        write_weights(layout.iteration_dir(folder, 0), weights, title=f"writing {output.name}")
        layout.write_latest(folder, 0)
