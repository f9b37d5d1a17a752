"""What a dense model does on a user's text, per layer: the input of the data-driven constructions.

    DIR/statistics.json           model, groups, settings; written last: where it is, all is there
    DIR/layer_0000.safetensors    one file a layer, read when it is asked for

C groups of tokens (domains or clusters), d_h FFN width, h hidden size, n sampled tokens.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.files import written_whole

META_FILE = "statistics.json"
FORMAT_VERSION = 1
COLLECT = "collect it with tools/collect_statistics.py"


@dataclass
class LayerStatistics:
    """One layer. L is the language-model loss summed over tokens, a = SiLU(gate) * up the input of
    the FFN's last matrix; masked and padded positions are in no sum.
    """

    tokens: Tensor
    """Tokens of each group, int64 [C]."""
    input_mean: Tensor
    """Mean FFN input of each group (after the norm, where a router reads), float64 [C, h]; 0 for
    a group without tokens.
    """
    importance: Tensor | None = None
    """Sum over tokens of |a * dL/da|, float64 [C, d_h] (LLaMA-MoE, eq. 8)."""
    gradient: Tensor | None = None
    """Sum over tokens of |dL/da|, float64 [C, d_h]."""
    inputs: Tensor | None = None
    """FFN inputs of sampled tokens, float32 [n, h]."""
    input_groups: Tensor | None = None
    """Group of each sampled token, int64 [n]."""
    centroids: Tensor | None = None
    """Cluster centres of the FFN inputs, float32 [C, h], where they define the groups: a token's
    group is the argmax of input . centroid (LLaMA-MoE v2).
    """


class Statistics:
    """A complete directory of statistics; layers are read one at a time."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.fingerprint: str = meta["model"]
        """`checkpoint.experts.fingerprint` of the dense model."""
        self.groups: list[str] = meta["groups"]
        self.num_layers: int = meta["num_layers"]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what describes a directory of statistics.

        Raises:
            UserError: there is none, it is not finished, or of another version.
        """
        path = Path(path)
        file = path / META_FILE
        if not file.is_file():
            if (path / PARTIAL_DIR).is_dir():
                raise UserError(
                    f"the statistics in {path} are not finished",
                    "start tools/collect_statistics.py again with the same options: it goes on",
                )
            raise UserError(f"{path} holds no statistics", COLLECT)
        try:
            meta = json.loads(file.read_text())
            version = meta["format_version"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is damaged", COLLECT) from None
        if version != FORMAT_VERSION:
            raise UserError(f"{file} is of format {version}, not {FORMAT_VERSION}", COLLECT)
        return cls(path, meta)

    def check(self, fingerprint: str) -> None:
        """Refuse statistics of another model.

        Raises:
            UserError: `fingerprint` is not that of the model they were collected from.
        """
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the statistics in {self.path} are of another model "
                f"({self.fingerprint[:19]}, not {fingerprint[:19]})",
                "collect them from the model that is converted, in the same precision",
            )

    def layer(self, number: int) -> LayerStatistics:
        """Statistics of layer `number` (from 0).

        Raises:
            UserError: its file is missing or damaged.
        """
        file = layer_file(self.path, number)
        try:
            return LayerStatistics(**load_file(file))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(f"{file} is missing or damaged ({error})", COLLECT) from None


PARTIAL_DIR = "partial"
"""Where an unfinished collection keeps its sums."""


def layer_file(path: Path, number: int) -> Path:
    return path / f"layer_{number:04d}.safetensors"


def write_layer(path: Path, number: int, statistics: LayerStatistics) -> None:
    """Write one layer's file into a directory of statistics."""
    fields = (field.name for field in dataclasses.fields(statistics))
    tensors = {name: value for name in fields if (value := getattr(statistics, name)) is not None}
    write_tensors(layer_file(path, number), tensors)


def write_meta(
    path: Path, fingerprint: str, groups: list[str], num_layers: int, **more: Any
) -> None:
    """Declare a directory of statistics complete."""
    meta = {
        "format_version": FORMAT_VERSION,
        "model": fingerprint,
        "groups": groups,
        "num_layers": num_layers,
        **more,
    }
    write_json(path / META_FILE, meta)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file so that it is there whole or not at all."""
    with written_whole(file) as partial:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    with written_whole(file) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def group_means(sums: Tensor, tokens: Tensor) -> Tensor:
    """sums [C, h] over tokens [C]; 0 for a group without tokens."""
    means: Tensor = sums / tokens.clamp(min=1).to(torch.float64).unsqueeze(1)
    return means
