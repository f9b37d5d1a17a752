import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.permutation import MAX_SIZE, mix_key, permute

keys = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4095, 4096, 4097, 100_003])
def test_bijection(size: int) -> None:
    image = permute(np.arange(size), size, (7, size))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), keys)
def test_bijection_for_any_key(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, MAX_SIZE), keys, st.data())
def test_large_sizes_stay_in_range_without_collisions(
    size: int, key: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, max(size - 500, 0)))
    index = np.arange(start, min(start + 500, size))
    image = permute(index, size, key)
    assert image.min() >= 0 and image.max() < size and len(np.unique(image)) == len(index)


def test_one_call_for_many_permutations_equals_many_calls() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(1, 10**6, 200)
    index = rng.integers(0, size)
    key, epoch = rng.integers(0, 2**62, 200), rng.integers(0, 5, 200)
    together = permute(index, size, (key, epoch))
    alone = [
        int(permute(int(i), int(n), (int(k), int(e))))
        for i, n, k, e in zip(index, size, key, epoch, strict=True)
    ]
    assert together.tolist() == alone


def test_shape_follows_the_index() -> None:
    assert np.shape(permute(3, 10, 1)) == ()
    grid = np.arange(12).reshape(3, 4)
    assert np.array_equal(permute(grid, 12, 1).ravel(), permute(grid.ravel(), 12, 1))


def test_known_values_never_change() -> None:
    """A resumed run must read the order it was started with, in every later version."""
    assert permute(np.arange(10), 10, (1, 2)).tolist() == [7, 4, 3, 9, 1, 5, 2, 8, 6, 0]
    assert permute(np.array([0, 1, 10**15]), 2**50, 3).tolist() == [
        430421544025679,
        377231278892652,
        258657124383468,
    ]


def test_keys_differ_by_every_part_and_by_order() -> None:
    parts = [(1, 2), (2, 1), (1, 3), (1,), (1, 2, 0), (0, 1, 2)]
    assert len({int(mix_key(*part)[0]) for part in parts}) == len(parts)


def test_looks_random() -> None:
    """Each element lands in each tenth equally often, neighbours part, and keys are independent."""
    size = 10_000
    images = np.stack([permute(np.arange(size), size, (5, key)) for key in range(20)])
    expected = size / 100
    for image in images:
        table = np.histogram2d(np.arange(size), image, bins=10)[0]
        assert ((table - expected) ** 2 / expected).sum() < 150  # chi-square, 81 degrees of freedom
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(images) - np.eye(20)).max() < 0.05


def test_all_orders_of_a_small_set_appear() -> None:
    orders = [tuple(permute(np.arange(4), 4, key).tolist()) for key in range(2400)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 40


@pytest.mark.parametrize("index, size", [(5, 5), (-1, 5), (0, 0), (0, MAX_SIZE + 1)])
def test_out_of_range_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError):
        permute(index, size, 0)
