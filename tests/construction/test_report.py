"""Measures of a layer of experts against sums over tokens and experts, written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_ext.construction import partition
from megatron_ext.construction.report import (
    MoeLayer,
    Routing,
    equal_weight,
    measure,
    overlap,
    swiglu,
)
from megatron_ext.model.xft import xft_weights

H, D, E, N = 12, 24, 4, 40


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4


X, GATE, UP, DOWN = normal(0, N, H), normal(1, D, H), normal(2, D, H), normal(3, H, D)


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One token, neuron by neuron."""
    y = torch.zeros(H, dtype=torch.float64)
    for g, u, d in zip(gate, up, down.T, strict=True):
        a = g @ x
        y += a / (1 + torch.exp(-a)) * (u @ x) * d
    return y


DENSE = torch.stack([ffn(x, GATE, UP, DOWN) for x in X])


def cut(neurons: Tensor, residual: int = 0, mlp: bool = False) -> MoeLayer:
    """Experts of these neurons, beside one that has the last `residual` of the FFN."""
    fc1, fc2 = partition.slice_experts(GATE, UP, DOWN, neurons)
    rest = slice(D - residual, D)
    return MoeLayer(
        normal(4, E, H),
        fc1,
        fc2,
        normal(5, E, E) if mlp else None,
        torch.cat([GATE[rest], UP[rest]]) if residual else None,
        DOWN[:, rest] if residual else None,
    )


def token(x: Tensor, layer: MoeLayer, routing: Routing) -> tuple[Tensor, list[int]]:
    """Output of one token and the experts that it chose."""
    logits = [float(v) for v in layer.router @ x]
    if layer.router_out is not None:
        hidden = torch.tensor([math.tanh(v) for v in logits], dtype=torch.float64)
        logits = [float(v) for v in layer.router_out @ hidden]
    chosen = sorted(range(E), key=lambda e: -logits[e])[: routing.topk]
    whole = sum(math.exp(v) for v in logits)
    softmax = [math.exp(v) / whole for v in logits]
    shared = 1.0
    if routing.xft:
        parts = {e: math.exp(softmax[e]) for e in chosen}
        shared = 1 - max(softmax)
        weight = {e: max(softmax) * p / sum(parts.values()) for e, p in parts.items()}
    elif routing.topk == 1:
        weight = {chosen[0]: softmax[chosen[0]] * routing.score_scale}
    else:
        among = sum(softmax[e] for e in chosen)
        weight = {e: softmax[e] / among * routing.score_scale for e in chosen}
    y = torch.zeros(H, dtype=torch.float64)
    for e, share in weight.items():
        y += share * ffn(x, *layer.fc1[e].chunk(2), layer.fc2[e])
    if layer.shared_fc1 is not None and layer.shared_fc2 is not None:
        y += shared * ffn(x, *layer.shared_fc1.chunk(2), layer.shared_fc2)
    return y, chosen


COPIES = torch.arange(D).repeat(E, 1)
RANDOM = partition.independent_random(D, E, 0, 0)
CASES = {
    "partition": (cut(RANDOM), Routing(2, 2.0), 1.0),
    "mlp gate": (cut(RANDOM, mlp=True), Routing(3, 4.0), 1.0),
    "top-1": (cut(RANDOM), Routing(1, 4.0), 1.0),
    "residual": (cut(torch.arange(20).view(E, 5), residual=4), Routing(2, 2.0), 1.0),
    "copies": (cut(COPIES), Routing(2, 1.0), 1 / E),
    "xft": (cut(COPIES, residual=D), Routing(2, 1.0, xft=xft_weights), 0.0),
    "overlapping": (cut(torch.arange(8) + torch.tensor([[0], [4], [8], [16]])), Routing(2, 2), 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_measures_are_those_of_the_formulas(name: str) -> None:
    layer, routing, equal = CASES[name]
    found = measure(X, swiglu(X, GATE, UP, DOWN), layer, routing, equal)
    outputs, choices = zip(*(token(x, layer, routing) for x in X), strict=True)
    y = torch.stack(outputs)
    close = {"rel": 1e-9, "abs": 1e-6 if routing.xft else 1e-12}  # XFT's weights are in fp32 or 64
    assert found.error == pytest.approx(float((y - DENSE).norm() / DENSE.norm()), **close)
    assert found.norm_ratio == pytest.approx(float(y.norm() / DENSE.norm()), rel=1e-6)
    counts = [sum(e in choice for choice in choices) for e in range(E)]
    assert found.loads == pytest.approx([c / (N * routing.topk) for c in counts])
    assert found.imbalance == pytest.approx(max(counts) / (N * routing.topk / E))
    if name == "overlapping":
        assert found.error_all > 0.1
    else:  # every one of them is the FFN when all experts are there
        assert found.error_all < 1e-6
    if name in ("copies", "xft"):
        assert found.error < 1e-6
    else:
        assert found.error > 0.1


def test_a_wrong_weight_is_seen() -> None:
    layer, routing, _ = CASES["partition"]
    dense = swiglu(X, GATE, UP, DOWN)
    assert measure(X, dense, layer, routing, 0.9).error_all == pytest.approx(0.1)
    everyone = MoeLayer(torch.zeros(E, H, dtype=torch.float64), layer.fc1, layer.fc2)
    assert measure(X, dense, everyone, Routing(E, float(E)), 1.0).error < 1e-12
    halved = measure(X, dense, everyone, Routing(E, E / 2), 1.0)
    assert halved.error == pytest.approx(0.5) and halved.norm_ratio == pytest.approx(0.5)


def test_swiglu_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ext.construction import report

    monkeypatch.setattr(report, "_BLOCK", 7)
    torch.testing.assert_close(swiglu(X, GATE, UP, DOWN), DENSE)


def test_equal_weight() -> None:
    assert equal_weight(4, 6, 24) == 1
    assert equal_weight(7, 3, 24, residual=3) == 1
    assert equal_weight(4, 12, 24) == 0.5


def test_overlap() -> None:
    assert overlap(RANDOM) == 0
    assert overlap(COPIES) == 1
    assert overlap(torch.arange(4)[None]) == 0
    # |a n b| = 1 of |a u b| = 3, |a n c| = 0, |b n c| = 2 of 2
    assert overlap(torch.tensor([[0, 1], [1, 2], [2, 1]])) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    groups = torch.arange(D).view(2, -1).repeat(2, 1)
    assert overlap(groups) == pytest.approx(2 / 6)
