"""Write a torch_dist checkpoint tensor by tensor, with no more than one of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from tqdm import tqdm

from megatron_ext.checkpoint.layout import write_text
from megatron_ext.checkpoint.tensors import Weights, check_finite, tensor_shapes
from megatron_ext.errors import UserError

# metadata.json: what megatron-core takes for the mark of a complete distributed checkpoint.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _LazyPlanner(DefaultSavePlanner):
    """Plans from tensors without data and asks for the data when it is written."""

    def __init__(self, produce: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._produce = produce

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._produce(index.fqn)


def write_weights(
    folder: Path, weights: Weights, dtype: torch.dtype | None = None, title: str = "writing"
) -> int:
    """Write all weights of a model for megatron-core's dist_checkpointing.load on any grid.

    Args:
        folder: an iteration's directory; created.
        weights: asked for every tensor of its model, in order, once.
        dtype: type to store; none: the source's.
        title: text of the progress bar.

    Returns:
        Bytes of tensor data.

    Raises:
        UserError: a tensor has the wrong shape, holds NaN, or was not written exactly once.
    """
    dtype = dtype or weights.dtype
    shapes = tensor_shapes(weights.model)
    plan: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()
    }
    total = sum(tensor.nbytes for tensor in plan.values())
    written: set[str] = set()
    with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:

        def produce(key: str) -> Tensor:
            if key in written:
                raise UserError(f"tensor {key} would be written twice")
            tensor = weights.tensor(key)
            if tensor.shape != shapes[key]:
                raise UserError(
                    f"tensor {key} has shape {list(tensor.shape)}, "
                    f"the model needs {list(shapes[key])}"
                )
            check_finite(key, tensor)
            written.add(key)
            bar.update(plan[key].nbytes)
            return tensor.to(dtype).contiguous()

        folder.mkdir(parents=True)
        # One file a tensor: torch's writer holds on to all tensors of a file until it is closed.
        storage = FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
        try:
            dcp.save(plan, storage_writer=storage, planner=_LazyPlanner(produce), no_dist=True)
        except CheckpointException as error:
            for failure in error.failures.values():
                if isinstance(failure[0], UserError):
                    raise failure[0] from None
            raise
    missing = shapes.keys() - written
    if missing:
        raise UserError(f"tensors were not written: {', '.join(sorted(missing))}")
    _check_files(folder)
    torch.save({}, folder / "common.pt")  # what is not sharded: nothing
    write_text(folder / "metadata.json", json.dumps(FORMAT))
    return total


def _check_files(folder: Path) -> None:
    """Every file is as long as the index says (a full disk is noticed here at the latest)."""
    for index, info in FileSystemReader(folder).read_metadata().storage_data.items():
        size = (folder / info.relative_path).stat().st_size
        if size < info.offset + info.length:
            raise UserError(
                f"{folder / info.relative_path} holds {size} bytes, {index.fqn} needs "
                f"{info.offset + info.length}",
                "is the disk full?",
            )
