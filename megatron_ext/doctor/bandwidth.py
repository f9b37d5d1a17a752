"""How fast the collectives of a training are on the ranks that torchrun started.

Bandwidths are defined as in NVIDIA's nccl-tests (its PERFORMANCE.md): with S bytes in the larger of
a rank's two buffers and t seconds, the algorithm's is S / t. The bus bandwidth multiplies that by
the share of S that has to leave a rank, so that it compares with the speed of the links whatever
the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

WARM_UP = 2
SECONDS = 0.3
"""Measured for about this long, but at least 3 and at most 50 times."""


@dataclass(frozen=True)
class Bandwidth:
    """One collective at one size."""

    collective: str
    ranks: int
    bytes: int
    """S: of the larger buffer of a rank."""
    seconds: float
    """Mean time of a call, on the slowest rank."""

    @property
    def algorithm(self) -> float:
        """GB/s (1e9 bytes)."""
        return self.bytes / self.seconds / 1e9

    @property
    def bus(self) -> float:
        """GB/s (1e9 bytes) that each rank's links carried."""
        share = (self.ranks - 1) / self.ranks
        return self.algorithm * (2 * share if self.collective == "all_reduce" else share)

    def __str__(self) -> str:
        return (
            f"{self.collective:<15} {self.ranks:>5} ranks {self.bytes / 2**20:>8.0f} MiB "
            f"{self.seconds * 1e3:>10.3f} ms {self.algorithm:>8.2f} GB/s  bus {self.bus:>8.2f} GB/s"
        )


def collectives(whole: torch.Tensor, share: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The calls by name; `whole` is as long as all ranks' `share` together."""
    other = torch.empty_like(whole)
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, share),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(share, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
    }


def measure(sizes_mib: tuple[int, ...], device: torch.device) -> Iterator[Bandwidth]:
    """Every collective at every size (collective over all ranks; at least 2).

    Gradients and parameters (all_reduce, reduce_scatter, all_gather) and tokens on their way to
    their experts (all_to_all) are most of what a training sends.
    """
    ranks = dist.get_world_size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for size in sizes_mib:
        elements = max(1, size * 2**20 // dtype.itemsize // ranks)
        share = torch.zeros(elements, dtype=dtype, device=device)
        whole = torch.zeros(elements * ranks, dtype=dtype, device=device)
        for name, call in collectives(whole, share).items():
            seconds = _seconds_per_call(call, device)
            yield Bandwidth(name, ranks, whole.nbytes, seconds)


def _seconds_per_call(call: Callable[[], object], device: torch.device) -> float:
    first = min(_timed(call, 1, device) for _ in range(WARM_UP))
    return _timed(call, int(min(50, max(3, SECONDS / max(first, 1e-6)))), device)


def _timed(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean seconds of a call; the slowest rank's, on every rank."""
    _wait(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    slowest = torch.tensor((time.perf_counter() - start) / times, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
