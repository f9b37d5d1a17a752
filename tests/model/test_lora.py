"""Grouped adapters against one small product for each token, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.model.lora import AddLowRank, WeightedSwiglu

IN, OUT, RANK, COLUMNS, FIRST = 5, 3, 2, 8, 4
COUNTS = [[2, 3, 1], [0, 4, 0], [3, 0, 2], [0, 0, 0]]


def draw(counts: list[int], seed: int = 0) -> list[Tensor]:
    """y [T, n], x [T, in], a [e, r, in], b [e, out, r] in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = sum(counts), len(counts)
    shapes = [(tokens, COLUMNS), (tokens, IN), (experts, RANK, IN), (experts, OUT, RANK)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def adapted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
    return AddLowRank.apply(y.clone(), FIRST, x, a, b, 0.7, counts)


def one_by_one(y: Tensor, x: Tensor, a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for token, expert in enumerate(owner):
        change = 0.7 * b[expert] @ (a[expert] @ x[token])
        zeros = [y.new_zeros(FIRST), y.new_zeros(COLUMNS - FIRST - OUT)]
        rows.append(y[token] + torch.cat([zeros[0], change, zeros[1]]))
    return torch.stack(rows) if rows else y * 1


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_values_and_gradients(counts: list[int]) -> None:
    inputs = draw(counts)
    found, expected = adapted(*inputs, counts), one_by_one(*inputs, counts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    plain = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_gradients_are_those_of_finite_differences() -> None:
    counts = [2, 0, 3]
    assert torch.autograd.gradcheck(lambda *inputs: adapted(*inputs, counts), draw(counts))
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    probs = torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(WeightedSwiglu.apply, (both, probs))


def test_gradient_accumulates_in_main_grad() -> None:
    """Two micro-batches into megatron-core's buffer: the sum of their gradients, and no .grad."""
    plain, fused = draw([2, 0, 3]), draw([2, 0, 3])
    for factor in fused[2:]:
        factor.main_grad = torch.full_like(factor, 0.5)  # type: ignore[attr-defined]
        factor.fuses_gradient = True  # type: ignore[attr-defined]
    for counts in ([2, 0, 3], [1, 4, 0]):
        for inputs in (plain, fused):
            adapted(*inputs, counts).square().sum().backward()
    torch.testing.assert_close(fused[1].grad, plain[1].grad)
    for ours, reference in zip(fused[2:], plain[2:], strict=True):
        assert ours.grad is None and reference.grad is not None
        torch.testing.assert_close(ours.main_grad, reference.grad + 0.5)  # type: ignore[attr-defined]
