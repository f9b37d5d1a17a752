"""What a collection of statistics keeps on disk between its chunks, to go on when interrupted.

DIR/partial/progress.json     settings, and the chunks of samples that each pass has done
DIR/partial/layer_0000/       sums so far, FFN inputs chunk by chunk, centroids
DIR/partial/hidden_000000...  last hidden states chunk by chunk
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.construction import statistics
from megatron_ext.construction.statistics import write_json, write_tensors
from megatron_ext.errors import UserError

INPUTS, INPUT_GROUPS = "inputs", "input_groups"
"""Of the picked tokens of a chunk: their FFN inputs [n, h], and group + 1 or 0: not counted [n]."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers; a collection goes on only with the same."""

    model: str
    """`checkpoint.experts.fingerprint` of the dense model."""
    domains: dict[str, int]
    """Tokens of each domain by name."""
    task: str
    groups: str
    num_clusters: int
    num_samples: int
    num_inputs: int
    seq_length: int
    gradients: bool
    save_interval: int
    seed: int

    def group_names(self) -> list[str]:
        if self.groups == "domains":
            return list(self.domains)
        return [f"cluster_{number}" for number in range(self.num_clusters)]


def check_output(path: Path, settings: Settings) -> None:
    """Refuse a directory that holds something else than the start of this very collection.

    Raises:
        UserError: it is complete, of other settings, or not of statistics.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if (path / statistics.META_FILE).exists():
        raise UserError(f"output {path} holds complete statistics", "name another directory")
    if not (path / statistics.PARTIAL_DIR).is_dir():
        raise UserError(f"output {path} is not empty", "name another directory")
    stored = Unfinished(path, settings).settings
    different = [name for name, value in asdict(settings).items() if stored.get(name) != value]
    if different:
        raise UserError(
            f"output {path} holds a collection with another {', '.join(different)}",
            "give the same options to go on with it, or remove the directory",
        )


class Unfinished:
    """The folder of an unfinished collection, as it is when this object is made.

    Args:
        output: the directory of statistics.
        settings: of the collection that is begun or goes on.
    """

    def __init__(self, output: Path, settings: Settings) -> None:
        self.folder = output / statistics.PARTIAL_DIR
        file = self.folder / "progress.json"
        stored = json.loads(file.read_text()) if file.is_file() else {}
        self.settings: dict[str, Any] = stored.get("settings", asdict(settings))
        self._done: dict[str, int] = stored.get("done", {})
        self.loss: list[float] = stored.get("loss", [0.0, 0.0])
        """Summed loss, and its tokens."""

    def done(self, name: str) -> int:
        """Chunks that a pass has done."""
        return self._done.get(name, 0)

    def advance(self, name: str, chunk: int) -> None:
        """A pass has done a chunk."""
        self._done[name] = chunk + 1

    def save_progress(self) -> None:
        """Declare what has been done; its files must be there."""
        progress = {"settings": self.settings, "done": self._done, "loss": self.loss}
        write_json(self.folder / "progress.json", progress)

    def layer_folder(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:04d}"

    def _sums_file(self, layer: int, chunk: int) -> Path:
        return self.layer_folder(layer) / f"sums_{chunk:06d}.safetensors"

    def write_sums(self, layer: int, chunk: int, sums: dict[str, Tensor]) -> None:
        """Save a layer's sums over all chunks up to this one."""
        write_tensors(self._sums_file(layer, chunk), sums)

    def read_sums(self, layers: Iterable[int], done: int) -> dict[int, dict[str, Tensor]]:
        """Sums by layer after that many chunks."""
        if not done:
            return {}
        return {layer: load_file(self._sums_file(layer, done - 1)) for layer in layers}

    def drop_sums(self, layers: Iterable[int], before: int) -> None:
        """Remove the sums that those of chunk `before` replace."""
        for layer in layers:
            self._sums_file(layer, before - 1).unlink(missing_ok=True)

    def write_inputs(self, layer: int, chunk: int, kept: dict[str, Tensor]) -> None:
        """Save `INPUTS` and `INPUT_GROUPS` of a chunk."""
        write_tensors(self.layer_folder(layer) / f"inputs_{chunk:06d}.safetensors", kept)

    def read_inputs(self, layer: int) -> tuple[Tensor, Tensor]:
        """FFN inputs [n, h] of the picked tokens that count, and their samples' groups [n]."""
        files = sorted(self.layer_folder(layer).glob("inputs_*.safetensors"))
        chunks = [load_file(file) for file in files]
        inputs = torch.cat([chunk[INPUTS] for chunk in chunks])
        groups = torch.cat([chunk[INPUT_GROUPS] for chunk in chunks]) - 1
        return inputs[groups >= 0], groups[groups >= 0]

    def write_hidden(self, chunk: int, hidden: Tensor) -> None:
        """Save the mean last hidden states of a chunk's samples [samples, h]."""
        write_tensors(self.folder / f"hidden_{chunk:06d}.safetensors", {"hidden": hidden})

    def read_hidden(self) -> Tensor:
        """Those of all samples [P, h]."""
        files = sorted(self.folder.glob("hidden_*.safetensors"))
        return torch.cat([load_file(file)["hidden"] for file in files])

    @property
    def groups_file(self) -> Path:
        """Group of each sample [P], as `groups`."""
        return self.folder / "sample_groups.safetensors"

    def centroids_file(self, layer: int) -> Path:
        """Centroids [C, h] of a layer's FFN inputs, as `centroids`."""
        return self.layer_folder(layer) / "centroids.safetensors"

    def remove(self) -> None:
        """The collection is finished."""
        shutil.rmtree(self.folder)
