"""CPU-seconds and inertia of balanced k-means against the library k-means-constrained.

    pip install k-means-constrained
    python benchmarks/clustering.py                       # about 5 minutes
    python benchmarks/clustering.py --model SmolLM2       # a layer of it, and rows tiled from it

The peer solves a minimum-cost flow in every step; sizes are exactly equal in both. At 11008 x 4096
it starts once; on the layer of a small model it takes the best of its ten starts, ours is one. The
limit is one product of all vectors with the centroids, which a single step of any k-means needs.
Medians of our runs over several seeds. One thread each.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from report import Row, row, write  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from megatron_ext.construction.clustering import balanced_kmeans, inertia  # noqa: E402

CPU_BAR = 10.0
PEER_STEPS = 100  # it may not have converged by then, which the bar on its time forgives


def small_rows(model: Path | None) -> Tensor:
    """[1536, 576] rows of an up matrix, or what looks like one: directions of falling weight."""
    if model is None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(1536, 576, generator=generator)
        scales = torch.arange(1, 577) ** -0.25
        return normalize(weights * scales)
    from megatron_ext.checkpoint.hf import open_weights

    weights_of = open_weights(model)
    return normalize(weights_of.gate_up(weights_of.model.num_layers // 3)[1].float())


def large_rows(small: Tensor) -> Tensor:
    """[11008, 4096]: the small ones tiled, with as much noise again."""
    across, down = -(-4096 // small.shape[1]), -(-11008 // small.shape[0])
    rows = normalize(small.tile(down, across)[:11008, :4096])
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    return normalize(rows + noise / 64)


def cpu_seconds(start: float) -> float:
    return time.process_time() - start


def ours(rows: Tensor, experts: int, runs: int) -> tuple[float, float]:
    """Median CPU-seconds and median inertia."""
    seconds, inertias = [], []
    for seed in range(runs):
        start = time.process_time()
        labels, _ = balanced_kmeans(rows, experts, seed)
        seconds.append(cpu_seconds(start))
        inertias.append(inertia(rows, labels) / len(rows))
    return statistics.median(seconds), statistics.median(inertias)


def peer(rows: Tensor, experts: int, starts: int) -> tuple[float, float]:
    """CPU-seconds and inertia of k-means-constrained."""
    from k_means_constrained import KMeansConstrained

    size = len(rows) // experts
    clusters = KMeansConstrained(
        experts, size_min=size, size_max=size, n_init=starts, max_iter=PEER_STEPS, random_state=0
    )
    vectors = rows.numpy()
    start = time.process_time()
    labels = clusters.fit_predict(vectors)
    seconds = cpu_seconds(start)
    return seconds, inertia(rows, torch.as_tensor(labels).long()) / len(rows)


def step_seconds(rows: Tensor, experts: int) -> float:
    """CPU-seconds of one product with centroids."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        rows @ rows[:experts].T
        seconds.append(cpu_seconds(start))
    return statistics.median(seconds)


def measure(name: str, rows: Tensor, experts: int, starts: int, bar: bool, runs: int) -> list[Row]:
    what = f"{name} {rows.shape[0]} x {rows.shape[1]}, E={experts}, peer's n_init={starts}"
    print(what, flush=True)
    our_seconds, our_inertia = ours(rows, experts, runs)
    peer_seconds, peer_inertia = peer(rows, experts, starts)
    return [
        row(
            what,
            "CPU-seconds",
            our_seconds,
            peer_seconds,
            step_seconds(rows, experts),
            peer_seconds / CPU_BAR if bar else peer_seconds,
            higher_is_better=False,
        ),
        row(
            what,
            "inertia per vector",
            our_inertia,
            peer_inertia,
            bar=peer_inertia,
            higher_is_better=False,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="dense LLaMA of 1536 x 576 FFNs")
    parser.add_argument("--runs", type=int, default=3, help="seeds of ours")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    small = small_rows(options.model)
    large = large_rows(small)
    kind = "made-up rows" if options.model is None else "rows of the model"
    table: list[Row] = []
    for experts in (8, 16):
        table += measure(kind, small, experts, 10, False, options.runs)
    for experts in (16, 8):
        table += measure(f"{kind}, tiled,", large, experts, 1, True, options.runs)
    print(f"written to {write('clustering', table)}")


if __name__ == "__main__":
    main()
