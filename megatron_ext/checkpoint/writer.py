"""Write a torch_dist checkpoint tensor by tensor: one is written while the next is made."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options
from tqdm import tqdm

from megatron_ext.checkpoint.journal import Journal
from megatron_ext.checkpoint.layout import CONSTRUCTION_FILE, MODEL_FILE, write_text
from megatron_ext.checkpoint.tensors import Weights, check_finite, is_finite, tensor_shapes
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


class _Storage(FileSystemWriter):
    """One file a tensor, in order; those that a killed process finished are not written again."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        super().__init__(folder)
        self._folder, self._journal = folder, journal

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        paths = [self._folder / file_name(place) for place in range(len(plan.items))]
        # One tensor is written while the next is read and cut; the disk follows at its own speed.
        with (
            ThreadPoolExecutor(max_workers=1) as disk,
            ThreadPoolExecutor(max_workers=1) as writer,
        ):

            def write(path: Path, tensor: Tensor) -> Future[None]:
                _write(path, tensor)
                return disk.submit(self._journal.add, path)

            writing: Future[Future[None]] | None = None
            syncing = []
            for path, item in zip(paths, plan.items, strict=True):
                if path.name not in self._journal.finished:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    if writing is not None:
                        syncing.append(writing.result())
                    writing = writer.submit(write, path, tensor)
            if writing is not None:
                syncing.append(writing.result())
            for done in syncing:
                done.result()
        infos = [_StorageInfo(path.name, 0, path.stat().st_size) for path in paths]
        results: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        results.set_result(
            [
                WriteResult(item.index, info.length, info)
                for item, info in zip(plan.items, infos, strict=True)
            ]
        )
        return results

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # neither this machine's path nor a random number: same bytes always


def _write(path: Path, tensor: Tensor) -> None:
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save would write all of what this is a part of
    with _without_checksums(), path.open("wb") as stream:  # an option of each thread
        torch.save(tensor, stream)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.load never looks at them, and they cost more than reading and writing together."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def file_name(place: int) -> str:
    """Of the tensor at a place in the order of `tensor_shapes`."""
    return f"__0_{place}.distcp"


def write_weights(
    folder: Path, weights: Weights, dtype: torch.dtype | None = None, title: str = "writing"
) -> int:
    """Write all weights of a model for megatron-core's dist_checkpointing.load on any grid.

    Tensors that a killed call wrote into the same folder, beside the same model.yaml and
    construction.json, are kept.

    Args:
        folder: an iteration's directory; created where it is missing.
        weights: asked for every tensor of its model that is not written yet, in order, once.
        dtype: type to store; none: the source's.
        title: text of the progress bar.

    Returns:
        Bytes of tensor data.

    Raises:
        UserError: a tensor has the wrong shape, or holds NaN or what `dtype` cannot hold; the disk
            is too small.
    """
    dtype = dtype or weights.dtype
    shapes = tensor_shapes(weights.model)
    plan: dict[str, Any] = {
        key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()
    }
    total = sum(tensor.nbytes for tensor in plan.values())
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, _identity(folder.parent, dtype))
    kept = {key for place, key in enumerate(plan) if file_name(place) in journal.finished}
    done = sum(plan[key].nbytes for key in kept)
    free = shutil.disk_usage(folder).free
    if free < total - done:
        raise UserError(
            f"{folder} needs {(total - done) / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left",
            "free space, or name another output",
        )
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=title) as bar:

        def produce(key: str) -> Tensor:
            tensor = weights.tensor(key)
            if tensor.shape != shapes[key]:
                raise UserError(
                    f"tensor {key} has shape {list(tensor.shape)}, "
                    f"the model needs {list(shapes[key])}"
                )
            check_finite(key, tensor)
            stored = tensor.detach().to(dtype).contiguous()
            if tensor.dtype != dtype and not is_finite(stored):
                raise UserError(
                    f"tensor {key} holds numbers that are too large for {dtype}",
                    "choose another --dtype",
                )
            bar.update(stored.nbytes)
            return stored

        try:
            dcp.save(
                plan,
                storage_writer=_Storage(folder, journal),
                planner=_LazyPlanner(produce),
                no_dist=True,
            )
        except CheckpointException as error:  # wraps everything, even an interrupt
            raise next(iter(error.failures.values()))[0] from None
        finally:
            journal.close()
    _check_files(folder, plan, journal.finished)
    torch.save({}, folder / "common.pt")  # what is not sharded: nothing
    write_text(folder / "metadata.json", json.dumps(FORMAT))
    journal.remove()
    return total


def _identity(checkpoint: Path, dtype: torch.dtype) -> str:
    """Names what the weights are by what describes them beside their folder."""
    digest = hashlib.sha256(str(dtype).encode())
    for name in (MODEL_FILE, CONSTRUCTION_FILE):
        if (checkpoint / name).is_file():
            digest.update((checkpoint / name).read_bytes())
    return digest.hexdigest()


def _check_files(folder: Path, plan: dict[str, Tensor], sizes: dict[str, int]) -> None:
    """Every tensor is in the index, and its file as long as it was when it reached the disk."""
    index = FileSystemReader(folder).read_metadata().storage_data
    missing = plan.keys() - {entry.fqn for entry in index}
    if missing:
        raise UserError(f"tensors were not written: {', '.join(sorted(missing))}")
    for entry, info in index.items():
        size = (folder / info.relative_path).stat().st_size
        if size != sizes[info.relative_path] or size < plan[entry.fqn].nbytes:
            raise UserError(
                f"{folder / info.relative_path} holds {size} bytes of {entry.fqn}, "
                f"{sizes[info.relative_path]} were written",
                "does another program change the output?",
            )
