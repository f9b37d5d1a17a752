"""Buckets against every assignment there is, and what the weights of the binary loss promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ext.construction.buckets import (
    UNITS_PER_NAT,
    assign_buckets,
    bucket_bounds,
    class_weights,
    hold_out,
    random_buckets,
)


@pytest.mark.parametrize(
    ("samples", "experts", "capacity", "bounds"),
    [
        (12, 4, 1.0, (3, 3)),
        (13, 4, 1.0, (3, 4)),
        (100, 8, 1.25, (10, 16)),
        (9, 8, 2.0, (1, 3)),
        (3, 4, 1.0, (0, 1)),
        (12, 4, 0.0, (0, 12)),
    ],
)
def test_bounds(samples: int, experts: int, capacity: float, bounds: tuple[int, int]) -> None:
    assert bucket_bounds(samples, experts, capacity) == bounds


@pytest.mark.parametrize("capacity", [0.0, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("ties", [False, True])
def test_no_assignment_within_the_bounds_is_better(capacity: float, ties: bool) -> None:
    random = np.random.default_rng(0)
    for experts, samples in [(2, 2), (2, 7), (3, 5), (3, 6), (3, 7)]:
        # The last expert is best at nearly everything, as the last checkpoint of a run is.
        losses = random.normal(size=(samples, experts)) - 1.5 * np.arange(experts)
        losses = np.round(losses) if ties else losses
        lower, upper = bucket_bounds(samples, experts, capacity)
        found = assign_buckets(losses, capacity)
        sizes = np.bincount(found, minlength=experts)
        assert lower <= sizes.min() <= sizes.max() <= upper
        every = np.array(list(itertools.product(range(experts), repeat=samples)))
        counts = (every[:, :, None] == np.arange(experts)).sum(1)
        allowed = every[(counts >= lower).all(1) & (counts <= upper).all(1)]
        best = np.take_along_axis(losses[None], allowed[..., None], 2).sum((1, 2)).min()
        rounding = samples / UNITS_PER_NAT
        assert losses[np.arange(samples), found].sum() <= best + rounding


def test_buckets_do_not_depend_on_the_last_bits() -> None:
    random = np.random.default_rng(1)
    losses = np.round(random.normal(size=(60, 1)), 3).repeat(4, 1)  # four experts, all the same
    noise = 1e-6 * random.normal(size=losses.shape)
    assert np.array_equal(assign_buckets(losses, 1.0), assign_buckets(losses + noise, 1.0))
    assert set(assign_buckets(losses, 0.0)) == {0}


def test_random_buckets_are_even_and_of_the_seed() -> None:
    buckets = random_buckets(30, 4, seed=3)
    assert sorted(np.bincount(buckets)) == [7, 7, 8, 8]
    assert np.array_equal(buckets, random_buckets(30, 4, seed=3))
    assert not np.array_equal(buckets, random_buckets(30, 4, seed=4))


def test_every_bucket_keeps_its_share_out() -> None:
    buckets = np.repeat([0, 1, 3], [10, 3, 1])
    held = hold_out(buckets, 0.4, seed=0)
    assert np.bincount(buckets[held], minlength=4).tolist() == [4, 1, 0, 0]
    assert not np.array_equal(held, hold_out(buckets, 0.4, seed=1))


def test_own_tokens_weigh_as_much_as_all_others() -> None:
    tokens = np.array([10, 30, 0, 60])
    own, other = class_weights(tokens, "others")
    np.testing.assert_allclose(own * tokens, [50, 50, 0, 50])
    np.testing.assert_allclose(other * (100 - tokens), 50)
    own, other = class_weights(tokens, "none")
    np.testing.assert_allclose(own * tokens, [100, 100, 0, 100])
    assert not other.any()
