"""Intervals of paired differences: against tables, and against what they promise."""

import math
import random

import pytest

from benchmarks.paired import paired, t_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [  # Abramowitz and Stegun, table 26.10
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.95, 5, 2.015),
        (0.995, 4, 4.604),
        (0.995, 7, 3.499),
        (0.5, 6, 0.0),
    ],
)
def test_quantiles_are_those_of_the_table(
    probability: float, freedom: int, quantile: float
) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(quantile, abs=6e-4)


def test_many_degrees_of_freedom_are_the_normal_distribution() -> None:
    assert t_quantile(0.975, 4000) == pytest.approx(1.96, abs=2e-3)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_what_has_no_quantile_is_refused(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError):
        t_quantile(probability, freedom)


def test_differences_are_taken_by_seed() -> None:
    theirs = {1: 10.0, 2: 20.0, 3: 30.0, 4: -1.0}
    ours = {3: 29.0, 1: 9.5, 2: 20.5, 7: 0.0}
    found = paired(ours, theirs)
    assert (found.pairs, found.below) == (3, 2)
    assert found.mean == pytest.approx(-1 / 3)
    # Differences -0.5, 0.5, -1: standard deviation 0.7638, t(0.975, 2) = 4.303.
    half = 4.3027 * 0.76376 / math.sqrt(3)
    assert found.low == pytest.approx(-1 / 3 - half, abs=1e-3)
    assert found.high == pytest.approx(-1 / 3 + half, abs=1e-3)
    assert found.sign == 0


def test_what_seeds_do_to_both_cancels() -> None:
    theirs = {seed: 1.0 * seed for seed in range(5)}
    found = paired({seed: value - 0.1 for seed, value in theirs.items()}, theirs)
    assert found.sign == -1 and found.high == pytest.approx(-0.1)


def test_one_pair_has_no_interval_and_no_pair_is_refused() -> None:
    found = paired({1: 1.0}, {1: 3.0})
    assert (found.mean, found.low, found.high, found.sign) == (-2.0, -math.inf, math.inf, 0)
    with pytest.raises(ValueError, match="common"):
        paired({1: 1.0}, {2: 1.0})


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(600):
        found = paired({s: draw.gauss(0.3, 1) for s in range(5)}, dict.fromkeys(range(5), 0.0))
        held += found.low <= 0.3 <= found.high
    assert 0.92 < held / 600 < 0.98
