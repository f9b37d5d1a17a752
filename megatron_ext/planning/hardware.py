"""GPUs, what they are taken to achieve, and how long kernels and messages take on them.

Peaks are the data sheets'; efficiencies are assumptions (`Assumed`), and nothing here was measured
on a GPU by this project.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.planning.observer import Call, Work


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual node (NVIDIA's data sheets)."""

    name: str
    peak: float
    """Dense bf16 tensor-core FLOP/s."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s."""
    nvlink: float
    """Bytes/s to the other GPUs of the node, one direction."""
    network: float
    """Bytes/s out of the node: an adapter for each GPU (HDR with A100, NDR with H100)."""
    matmul: float
    """Assumed share of the peak that matrix products and attention reach."""


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100-40G", 312e12, 40e9, 1.555e12, 300e9, 25e9, 0.75),
        Gpu("A100", 312e12, 80e9, 2.039e12, 300e9, 25e9, 0.75),
        Gpu("A800", 312e12, 80e9, 2.039e12, 200e9, 25e9, 0.75),
        Gpu("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 0.6),
        Gpu("H800", 989e12, 80e9, 3.35e12, 200e9, 50e9, 0.6),
        Gpu("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 0.6),
    )
}
"""By lower-case name."""


@dataclass
class Assumed:
    """What is assumed of the machine; none of it was measured on a GPU by this project."""

    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    matmul_efficiency: float | None = None
    """Share of the peak that matrix products reach; none: 0.75 (A100), 0.6 (H100, H200)."""
    bandwidth_efficiency: float = 0.8
    """Share of the memory's bandwidth that other operators reach."""
    network_efficiency: float = 0.8
    """Share of the bandwidth that messages reach, on NVLink and between nodes."""
    launch_us: float = 4.0
    """Shortest time of an operator."""
    latency_us: float = 10.0
    """Time of an empty message, for each doubling of its group."""
    usable_memory: float = 0.92
    """Share of the memory that tensors may fill; the rest is CUDA's context, NCCL's and cuBLAS's
    buffers and fragmentation.
    """
    imbalance: float = 1.2
    """Tokens of the busiest rank's experts over the mean (the log's load_spread)."""
    write_gb_per_s: float = 2.0
    """Rate at which a node writes a checkpoint (GB/s)."""


@dataclass(frozen=True)
class Machine:
    """A GPU and what is assumed of it."""

    gpu: Gpu
    assumed: Assumed

    @property
    def usable(self) -> float:
        """Bytes that tensors may fill."""
        return self.gpu.memory * self.assumed.usable_memory

    def kernel_seconds(self, work: Work) -> float:
        """Operators one after another: each as long as its products, its traffic or its launch."""
        matmul = self.assumed.matmul_efficiency or self.gpu.matmul
        flops = self.gpu.peak * matmul
        bandwidth = self.gpu.memory_bandwidth * self.assumed.bandwidth_efficiency
        launch = self.assumed.launch_us * 1e-6
        return sum(
            count * max(operations / flops, moved / bandwidth, launch)
            for (operations, moved), count in work.kernels.items()
        )

    def crosses_nodes(self, ranks: Sequence[int]) -> bool:
        return ranks[0] // self.assumed.gpus_per_node != ranks[-1] // self.assumed.gpus_per_node

    def message_seconds(self, call: Call, size: float, ranks: Sequence[int]) -> float:
        """Time of one message.

        Reductions and gathers are bound by the slower of NVLink and the adapters that a node's
        members of the group have together (rings); all-to-all sends each share its own way.

        Args:
            size: bytes as `observer.Work` counts them.
            ranks: of the group, in order; of a send: both.
        """
        n = len(ranks)
        here = max(Counter(rank // self.assumed.gpus_per_node for rank in ranks).values())
        nvlink = self.gpu.nvlink * self.assumed.network_efficiency
        network = self.gpu.network * self.assumed.network_efficiency
        latency = self.assumed.latency_us * 1e-6 * max(1.0, math.log2(n))
        if call.collective == "all_to_all":
            return latency + max(size * (here - 1) / n / nvlink, size * (n - here) / n / network)
        slowest = nvlink if here == n else min(nvlink, here * network)
        return latency + on_wire(call.collective, n) * size / slowest


def on_wire(collective: str, n: int) -> float:
    """Bytes that a rank sends for each byte of a message among n ranks (rings; even all-to-all)."""
    if collective == "all_reduce":
        return 2 * (n - 1) / n
    return 1.0 if collective in ("send", "broadcast") else (n - 1) / n
