"""Read whole tensors out of a torch_dist checkpoint, one at a time, whatever grid saved it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.checkpoint.layout import (
    PathLike,
    iteration_dir,
    latest_iteration,
    read_model_config,
)
from megatron_ext.checkpoint.tensors import (
    EMBEDDING,
    FC1,
    layer_key,
    tensor_shapes,
)
from megatron_ext.errors import UserError


class _Storage(FileSystemReader):
    """Reads the index once, not for every tensor."""

    _index: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata()
        return self._index


class CheckpointWeights:
    """The weights of a converted checkpoint or of a run (`tensors.Weights`)."""

    def __init__(self, path: PathLike, iteration: int | None = None) -> None:
        """Open a checkpoint directory.

        Args:
            path: directory with model.yaml.
            iteration: which one; none: the latest.

        Raises:
            UserError: not a checkpoint, or its tensors are not those of its model.
        """
        self.path = Path(path)
        self.model = read_model_config(path)
        iteration = latest_iteration(path) if iteration is None else iteration
        if iteration is None:
            raise UserError(
                f"{path} holds no complete checkpoint", "was the run stopped before it saved?"
            )
        self.iteration = iteration
        self.folder = iteration_dir(path, iteration)
        if not (self.folder / ".metadata").is_file():
            raise UserError(f"checkpoint {self.folder} is incomplete: it has no .metadata")
        self._storage = _Storage(self.folder)
        self.stored = {
            key: entry
            for key, entry in self._storage.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._check()
        self.dtype: torch.dtype = self.stored[EMBEDDING].properties.dtype

    def _check(self) -> None:
        for key, shape in tensor_shapes(self.model).items():
            entry = self.stored.get(key)
            if entry is None:
                raise UserError(f"checkpoint {self.folder} has no tensor {key}")
            found = tuple(entry.size)
            if found != shape:
                raise UserError(
                    f"checkpoint {self.folder}: {key} has shape {list(found)}, "
                    f"its model.yaml says {list(shape)}"
                )

    def tensor(self, key: str) -> Tensor:
        entry = self.stored[key]
        target = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({key: target}, storage_reader=self._storage, no_dist=True)
        return target

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.tensor(layer_key(layer, FC1)).chunk(2)
        return gate, up
