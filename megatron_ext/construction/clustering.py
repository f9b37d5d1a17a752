"""Balanced k-means: clusters of exactly (or nearly) the same size.

The classical way alternates centroids with an optimal assignment under size limits (a minimum-cost
flow). Here a few such steps, with a greedy assignment, only begin. Then vectors change places: two
of different clusters are exchanged wherever that lowers the inertia, the move of the two centroids
included. So sizes are kept by construction, a sweep costs one product with the centroids, and a
vector is not held in its cluster by its own share in the centroid: with thousands of dimensions
that share is what stops Lloyd's steps early.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import combinations, permutations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

MAX_SWEEPS = 100
STEP_TOLERANCE, TOLERANCE = 1e-4, 8e-6
"""Lloyd's steps, and sweeps, end when one lowers the inertia by less than this part of it."""
SMALLEST_SHARE = 1e-3
"""Sweeps end when even this part of the changes that look good does not lower the inertia."""
SAMPLE = 64
"""Vectors per cluster out of which the first centroids are drawn."""


def balanced_kmeans(
    vectors: Tensor,
    num_clusters: int,
    seed: int,
    metric: Literal["l2", "cosine"] = "l2",
    balance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Split vectors into clusters of bounded sizes with a small sum of squared distances.

    The same on every number of threads: it runs in one.

    Args:
        vectors: [n, h] of any floating type; the work is done in fp32.
        num_clusters: C, at most n.
        seed: of the first centroids (k-means++).
        metric: `l2`: as they are; `cosine`: by the angle between them after their mean is taken
            away (LLaMA-MoE).
        balance: how far a size may lie from n / C, as a part of it; 0: as equal as can be.

    Returns:
        labels [n] int64 and centroids [C, h] fp32, the means of the clusters' vectors; for `cosine`
        of the centred vectors of length 1, scaled to length 1.

    Raises:
        UserError: more clusters than vectors, or values that are not finite.
    """
    count = len(vectors)
    if not 1 <= num_clusters <= count:
        raise UserError(f"{num_clusters} clusters cannot be made of {count} vectors")
    if balance < 0:
        raise UserError(f"balance={balance} must not be negative")
    with torch.no_grad(), _one_thread():
        points = vectors.to(torch.float32)
        mean = points.mean(dim=0)
        if not torch.isfinite(mean).all():
            raise UserError("vectors to cluster hold values that are NaN or infinite")
        points = points - mean  # distances stay, and rounding errors do not grow with the mean
        if metric == "cosine":
            points = torch.nn.functional.normalize(points)
        clusters = _Clusters(points, num_clusters, seed, balance)
        clusters.refine()
        if metric == "cosine":
            return clusters.labels, torch.nn.functional.normalize(clusters.centroids)
        return clusters.labels, clusters.centroids + mean


def inertia(vectors: Tensor, labels: Tensor) -> float:
    """Sum over vectors [n, h] of the squared distance to the mean of their cluster, in float64."""
    total = 0.0
    for label in labels.unique():
        chosen = vectors[labels == label].double()
        total += float((chosen - chosen.mean(dim=0)).square().sum())
    return total


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The order of a sum, and so its last bit, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Clusters:
    """A clustering that is being improved: n centred vectors x, C clusters of sizes N."""

    def __init__(self, points: Tensor, num_clusters: int, seed: int, balance: float) -> None:
        self.points, self.num_clusters = points, num_clusters
        mean_size = len(points) / num_clusters
        self.smallest = min(math.floor(mean_size), max(1, math.ceil(mean_size * (1 - balance))))
        self.largest = max(math.ceil(mean_size), math.floor(mean_size * (1 + balance)))
        self.squares = points.norm(dim=1).square()
        seeds = _plus_plus(points, num_clusters, seed)
        distances = seeds.square().sum(dim=1) - 2 * (points @ seeds.T)
        self._set(_assign(distances, self.smallest, self.largest))

    def _set(self, labels: Tensor) -> None:
        self.labels = labels
        self.sizes = torch.bincount(labels, minlength=self.num_clusters)
        sums = torch.zeros(self.num_clusters, self.points.shape[1])
        self.centroids = sums.index_add_(0, labels, self.points) / self.sizes[:, None]

    def refine(self) -> None:
        """Lower the inertia: a few of Lloyd's steps, then exchanges until they gain no more."""
        inertia, gain = self._inertia(), torch.inf
        while gain > STEP_TOLERANCE * inertia:
            distances = self.centroids.square().sum(dim=1) - 2 * (self.points @ self.centroids.T)
            gain, inertia = self._try(_assign(distances, self.smallest, self.largest), inertia)
        share = 1.0
        for _ in range(MAX_SWEEPS):
            gain, inertia = self._try(self._sweep(share), inertia)
            if gain <= 0:  # changes were judged one by one, and disturbed each other: make fewer
                share /= 4
            elif gain <= TOLERANCE * inertia and share == 1:
                return
            else:
                share = min(1.0, share * 2)
            if share < SMALLEST_SHARE:
                return

    def _try(self, labels: Tensor, inertia: float) -> tuple[float, float]:
        """Take labels if they lower the inertia: the gain (0 where not), and what it is then."""
        before = self.labels, self.sizes, self.centroids
        self._set(labels)
        gain = inertia - self._inertia()
        if gain <= 0:
            self.labels, self.sizes, self.centroids = before
            return 0.0, inertia
        return gain, inertia - gain

    def _inertia(self) -> float:
        """Sum of |x|^2 less that of N |c|^2."""
        explained = self.centroids.square().sum(dim=1, dtype=torch.float64) * self.sizes
        inertia = float(self.squares.sum(dtype=torch.float64) - explained.sum())
        return max(inertia, 0.0)  # rounding, where every vector is its own centroid

    def _sweep(self, share: float) -> Tensor:
        """Labels after vectors were exchanged and, where sizes leave room, moved.

        Args:
            share: part of the changes that is carried out, the best of each kind first.
        """
        products = (self.points @ self.centroids.T).numpy()
        old = self.labels.numpy()
        new, free = old.copy(), np.ones(len(old), dtype=bool)
        sizes = self.sizes.tolist()
        members = [np.flatnonzero(old == k) for k in range(self.num_clusters)]
        for a, b in combinations(range(self.num_clusters), 2):
            first, second = self._exchange(products, sizes, members[a], members[b], a, b, free)
            chosen = slice(math.ceil(len(first) * share))
            for vectors, target in ((first[chosen], b), (second[chosen], a)):
                new[vectors] = target
                free[vectors] = False
        if self.smallest < self.largest:
            norms = self.centroids.square().sum(dim=1).numpy()
            for a, b in permutations(range(self.num_clusters), 2):
                room = min(sizes[a] - self.smallest, self.largest - sizes[b])
                moved = self._move(products, norms, sizes, members[a], a, b, free)
                moved = moved[: min(room, math.ceil(len(moved) * share))]
                new[moved] = b
                free[moved] = False
                sizes[a] -= len(moved)
                sizes[b] += len(moved)
        return torch.from_numpy(new)

    def _exchange(
        self,
        products: np.ndarray,
        sizes: list[int],
        in_a: np.ndarray,
        in_b: np.ndarray,
        a: int,
        b: int,
        free: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of a and those of b that they gain by changing places with, the best first.

        With centroids c and w = 1 / N_a + 1 / N_b, the exchange of i in a for j in b lowers the
        inertia by g_i(a, b) + g_j(b, a) - 2 w x_i.x_j where g_i(a, b) = 2 x_i.(c_b - c_a) + w
        |x_i|^2, so long as it is the only one. The last term is left out: vectors are centred, and
        in many dimensions two of them are nearly orthogonal.
        """
        weight = 1 / sizes[a] + 1 / sizes[b]

        def wishes(vectors: np.ndarray, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
            vectors = vectors[free[vectors]]
            rows = products[vectors]
            return vectors, 2 * (rows[:, b] - rows[:, a]) + weight * self.squares.numpy()[vectors]

        def falling(
            vectors: np.ndarray, gains: np.ndarray, other: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            good = np.flatnonzero(gains > -other.max(initial=-np.inf))  # the rest finds no partner
            order = good[np.argsort(-gains[good], kind="stable")]
            return vectors[order], gains[order]

        (first, gain_first), (second, gain_second) = wishes(in_a, a, b), wishes(in_b, b, a)
        best_first, sorted_first = falling(first, gain_first, gain_second)
        best_second, sorted_second = falling(second, gain_second, gain_first)
        length = min(len(best_first), len(best_second))
        pairs = np.count_nonzero(sorted_first[:length] + sorted_second[:length] > 0)
        return best_first[:pairs], best_second[:pairs]

    def _move(
        self,
        products: np.ndarray,
        norms: np.ndarray,
        sizes: list[int],
        in_a: np.ndarray,
        a: int,
        b: int,
        free: np.ndarray,
    ) -> np.ndarray:
        """Vectors of a that gain by moving to b, the best first (Hartigan and Wong 1979).

        A move lowers the inertia by N_a / (N_a - 1) d_a - N_b / (N_b + 1) d_b, with squared
        distances d to the centroids.
        """
        if sizes[a] == self.smallest or sizes[b] == self.largest:
            return in_a[:0]
        vectors = in_a[free[in_a]]
        squares = self.squares.numpy()[vectors]
        to_a = squares - 2 * products[vectors, a] + norms[a]
        to_b = squares - 2 * products[vectors, b] + norms[b]
        gains = to_a * (sizes[a] / (sizes[a] - 1)) - to_b * (sizes[b] / (sizes[b] + 1))
        order = np.argsort(-gains, kind="stable")
        return vectors[order[: np.count_nonzero(gains > 0)]]


def _plus_plus(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """First centroids [C, h]: vectors of a sample, each drawn by its squared distance to those
    before it (k-means++; Arthur and Vassilvitskii 2007)."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    count = min(len(points), SAMPLE * num_clusters)
    sample = points[np.sort(generator.choice(len(points), count, replace=False))]
    chosen = [int(generator.integers(count))]
    distances = torch.full((count,), torch.inf, dtype=torch.float64)
    while len(chosen) < num_clusters:
        last = (sample - sample[chosen[-1]]).norm(dim=1).double().square()
        distances = torch.minimum(distances, last)
        odds = distances.cumsum(dim=0).numpy()
        drawn = int(np.searchsorted(odds, generator.random() * odds[-1], side="right"))
        chosen.append(min(drawn, count - 1))
    return sample[chosen]


def _assign(distances: Tensor, smallest: int, largest: int) -> Tensor:
    """Labels [n] with every cluster's size within bounds, near the least sum of distances [n, C].

    Every vector asks for its nearest cluster with room; those that would lose most by going to
    their second choice are served first, and the others ask again.
    """
    count, num_clusters = distances.shape
    if num_clusters == 1:
        return torch.zeros(count, dtype=torch.long)
    labels = np.full(count, -1)
    left = np.arange(count)
    for capacity in (smallest, largest - smallest):
        room = np.full(num_clusters, capacity)
        while len(left) and room.any():
            costs = np.where(room > 0, distances.numpy()[left], np.inf)
            best = costs.argmin(axis=1)
            two = np.partition(costs, 1, axis=1)
            order = np.argsort(two[:, 0] - two[:, 1], kind="stable")
            for cluster in np.flatnonzero(room):
                served = left[order[best[order] == cluster][: room[cluster]]]
                labels[served] = cluster
                room[cluster] -= len(served)
            left = left[labels[left] < 0]
    return torch.from_numpy(labels)
