"""Which expert each seed sample is for (UpIT, arXiv 2410.01610, Algorithm 3).

A sample belongs to the bucket of the expert that predicts it best, within bounds on the sizes: late
checkpoints predict nearly everything best, and without bounds they would get all the data.

N samples, E experts.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import pairwise, permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Negatives = Literal["others", "none"]

UNITS_PER_NAT = 10_000
"""Losses are compared in whole units: what rounding on another grid changes must decide nothing."""
NEVER = 2**40


def bucket_bounds(samples: int, experts: int, capacity: float) -> tuple[int, int]:
    """Smallest and largest bucket: 1/c and c times an even share N / E, and never nothing.

    Args:
        capacity: c, from 1 on; 0: no bounds, not even against empty buckets.
    """
    if not capacity:
        return 0, samples
    share = samples / experts
    return min(max(1, math.floor(share / capacity)), math.floor(share)), math.ceil(share * capacity)


def assign_buckets(losses: NDArray[np.floating], capacity: float) -> NDArray[np.int64]:
    """Bucket of each sample [N]: the least sum of losses that the bounds of the sizes allow.

    A minimum-cost flow by successive shortest paths: from every sample's best expert, samples move
    along the cheapest chain of buckets, one to a link, from one that is too large to one with room,
    then from any that can spare one to one that is too small. Always the same for the same losses.

    Args:
        losses: [N, E] nats per token.
        capacity: see `bucket_bounds`.
    """
    samples, experts = losses.shape
    lower, upper = bucket_bounds(samples, experts, capacity)
    costs = np.rint(np.asarray(losses, np.float64) * UNITS_PER_NAT).astype(np.int64)
    buckets = costs.argmin(1)
    # Moves out of a bucket into another, cheapest first; some are of samples that have left.
    moves = [
        [
            sorted((int(costs[n, b] - costs[n, a]), int(n)) for n in np.flatnonzero(buckets == a))
            for b in range(experts)
        ]
        for a in range(experts)
    ]
    sizes = np.bincount(buckets, minlength=experts)
    while True:
        if (sizes > upper).any():
            sources, targets = sizes > upper, sizes < upper
        elif (sizes < lower).any():
            sources, targets = sizes > lower, sizes < lower
        else:
            return buckets
        price = np.full((experts, experts), NEVER)
        for a, b in permutations(range(experts), 2):
            queue = moves[a][b]
            while queue and buckets[queue[0][1]] != a:
                heappop(queue)
            if queue:
                price[a, b] = queue[0][0]
        path = _cheapest_path(price, sources, targets)
        links = [(moves[a][b][0][1], b) for a, b in pairwise(path)]
        for sample, bucket in links:
            buckets[sample] = bucket
            for other in range(experts):
                cost = int(costs[sample, other] - costs[sample, bucket])
                heappush(moves[bucket][other], (cost, sample))
        sizes[path[0]] -= 1
        sizes[path[-1]] += 1


def _cheapest_path(
    price: NDArray[np.int64], sources: NDArray[np.bool_], targets: NDArray[np.bool_]
) -> list[int]:
    """Bellman and Ford's: buckets from one of the sources to one of the targets."""
    distance = np.where(sources, 0, NEVER)
    before = np.full(len(price), -1)
    for _ in range(len(price)):
        through = distance[:, None] + price
        shortest = through.min(0)
        nearer = (shortest < distance) & (shortest < NEVER // 2)  # a path that there is
        if not nearer.any():
            break
        distance = np.where(nearer, shortest, distance)
        before = np.where(nearer, through.argmin(0), before)
    place = int(np.where(targets, distance, 2 * NEVER).argmin())
    path = [place]
    while before[place] >= 0:
        place = int(before[place])
        path.append(place)
    return path[::-1]


def random_buckets(samples: int, experts: int, seed: int) -> NDArray[np.int64]:
    """Even buckets that no expert was asked about (the ablation): [N]."""
    return _generator(seed, 0).permutation(np.arange(samples) % experts)


def hold_out(buckets: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which samples [N] are kept from training: this share of every bucket, rounded down."""
    held = np.zeros(len(buckets), bool)
    for bucket in np.unique(buckets):
        members = _generator(seed, 1, int(bucket)).permutation(np.flatnonzero(buckets == bucket))
        held[members[: int(share * len(members))]] = True
    return held


def class_weights(
    tokens: NDArray[np.integer], negatives: Negatives
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of a token in the binary loss of an expert, by whether its bucket is the expert's.

    With negatives, an expert's own tokens weigh as much in all as those of all others, so that the
    loss does not depend on how uneven the buckets are. Over all tokens and experts weights sum to
    their number.

    Args:
        tokens: [E] tokens in each bucket.
        negatives: `others`: the tokens of the other buckets; `none`: there are none, as in the
            paper.

    Returns:
        positive [E] and negative [E]; 0 where there are no such tokens.
    """
    own = np.asarray(tokens, np.float64)
    total = own.sum()

    def shared_out(weight: float, among: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(weight * total, among, out=np.zeros_like(among), where=among > 0)

    if negatives == "none":
        return shared_out(1.0, own), np.zeros_like(own)
    return shared_out(0.5, own), shared_out(0.5, total - own)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
