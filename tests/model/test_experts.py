"""The fused experts against one small FFN for each token, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.model.experts import SwigluExperts

HIDDEN, WIDTH = 5, 3
COUNTS = [[2, 3, 1], [0, 4, 0], [3, 0, 2], [0, 0, 0]]


def draw(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, h], w1 [e, 2m, h], w2 [e, h, m], probs [T] in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = sum(counts), len(counts)
    shapes = [(tokens, HIDDEN), (experts, 2 * WIDTH, HIDDEN), (experts, HIDDEN, WIDTH), (tokens,)]
    x, w1, w2, probs = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    return x, w1, w2, probs


def one_by_one(x: Tensor, w1: Tensor, w2: Tensor, probs: Tensor, counts: list[int]) -> Tensor:
    """y_t = p_t W_down (SiLU(W_gate x_t) * (W_up x_t)), token by token."""
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for token, expert in enumerate(owner):
        gate, up = w1[expert, :WIDTH] @ x[token], w1[expert, WIDTH:] @ x[token]
        rows.append(probs[token] * (w2[expert] @ (gate / (1 + torch.exp(-gate)) * up)))
    return torch.stack(rows) if rows else x.new_zeros(0, HIDDEN) * w1.sum() * w2.sum()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_values_and_gradients(counts: list[int]) -> None:
    inputs = draw(counts)
    found = SwigluExperts.apply(*inputs, counts)
    expected = one_by_one(*inputs, counts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    plain = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    for expert, count in enumerate(counts):
        if not count:
            assert not ours[1][expert].any() and not ours[2][expert].any()


def test_gradients_are_those_of_finite_differences() -> None:
    counts = [2, 0, 3]
    assert torch.autograd.gradcheck(
        lambda *inputs: SwigluExperts.apply(*inputs, counts), draw(counts)
    )


def test_gradient_accumulates_in_main_grad() -> None:
    """Two micro-batches into megatron-core's buffer: the sum of their gradients, and no .grad."""
    plain, fused = draw([2, 0, 3]), draw([2, 0, 3])
    for weight in fused[1:3]:
        weight.main_grad = torch.full_like(weight, 0.5)  # type: ignore[attr-defined]
        weight.fuses_gradient = True  # type: ignore[attr-defined]
    for counts in ([2, 0, 3], [1, 4, 0]):
        for inputs in (plain, fused):
            SwigluExperts.apply(*inputs, counts).square().sum().backward()
    for a, b in ((0, 0), (3, 3)):
        torch.testing.assert_close(fused[a].grad, plain[b].grad)
    for ours, reference in zip(fused[1:3], plain[1:3], strict=True):
        assert ours.grad is None and reference.grad is not None
        torch.testing.assert_close(ours.main_grad, reference.grad + 0.5)  # type: ignore[attr-defined]
