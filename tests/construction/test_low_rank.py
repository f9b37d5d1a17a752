"""Differences as LoRA factors, against the whole decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.construction.low_rank import factorise

SHAPES = [(64, 40), (40, 64), (150, 100)]


def matrix(shape: tuple[int, int], last: float, seed: int = 0) -> Tensor:
    """Singular values from 1 down to `last`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(drawn, full_matrices=False)
    fall = torch.logspace(0, torch.tensor(last).log10(), len(s), dtype=torch.float64)
    return (u * fall) @ v


def product(factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    a, b = factors
    return scale * b.double() @ a.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [1e-4, 0.1, 0.9])
def test_no_other_factors_are_nearer(shape: tuple[int, int], last: float) -> None:
    """Eckart and Young: the error is the norm of the singular values left out."""
    delta = matrix(shape, last)
    least = torch.linalg.svdvals(delta)[8:].norm()
    a, b = factorise(delta, 8, 2.0, seed=1)
    assert a.shape == (8, shape[1]) and b.shape == (shape[0], 8)
    assert (product((a, b), 2.0) - delta).norm() <= 1.005 * least
    # Both share each singular value out evenly.
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-6)


def test_what_has_the_rank_comes_back() -> None:
    delta = matrix((60, 8), 0.1) @ matrix((8, 50), 0.1)
    for rank in (8, 12):
        found = product(factorise(delta.float(), rank, 0.5, seed=1), 0.5)
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)
    # What the rank leaves over starts as a fresh adapter: A is drawn, B is 0.
    a, b = factorise(delta, 12, 0.5, seed=1)
    assert not b[:, 8:].any() and a[8:].abs().min() > 0
    assert a[8:].abs().max() <= 50**-0.5


def test_a_zero_matrix_is_a_fresh_adapter() -> None:
    a, b = factorise(torch.zeros(30, 20, dtype=torch.bfloat16), 4, 1.0, seed=1)
    assert not b.any() and a.abs().max() <= 20**-0.5
    assert a.std() == pytest.approx((3 * 20) ** -0.5, rel=0.2)


def test_a_seed_gives_the_same_bits_and_leaves_the_generator_alone() -> None:
    delta = matrix((150, 100), 0.9).float()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = factorise(delta, 8, 1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    second, other = (factorise(delta, 8, 1.0, seed=seed) for seed in (1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
