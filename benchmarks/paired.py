"""Paired differences between runs that share their seeds, with Student's t intervals.

Two strategies that train on the same seed share model, sample order and noise. What the seed alone
does to both then cancels in the difference, so that few seeds tell more than two means would.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, ours less theirs."""

    mean: float
    low: float
    """Lower end of the interval; minus infinity where one pair says nothing of the spread."""
    high: float
    pairs: int
    below: int
    """Pairs in which ours is the smaller one."""

    @property
    def sign(self) -> int:
        """-1: the interval lies below 0; 1: above; 0: it holds 0."""
        return (self.low > 0) - (self.high < 0)


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Difference:
    """Ours less theirs, over the seeds that both have.

    Raises:
        ValueError: no seed is common.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError("no common seed")
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean, count = statistics.fmean(differences), len(seeds)
    half = math.inf
    if count > 1:
        error = statistics.stdev(differences) / math.sqrt(count)
        half = t_quantile((1 + confidence) / 2, count - 1) * error
    return Difference(mean, mean - half, mean + half, count, sum(d < 0 for d in differences))


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: from 0.5 to below 1.
        freedom: degrees of freedom, a whole number from 1 on.
    """
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise ValueError(f"quantile {probability} with {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2  # t = sqrt(freedom) * tan(angle)
    for _ in range(100):
        middle = (low + high) / 2
        if (1 + _within(middle, freedom)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(angle)): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
