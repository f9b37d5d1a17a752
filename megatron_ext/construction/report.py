"""How far a layer of experts is from the dense FFN that it was made of, on inputs of that FFN.

    error        |y - y_dense| / |y_dense| with the layer's own router, top-k and score scale
    error_all    the same with all experts at equal weight: 0 where they are the FFN together
    norm_ratio   |y| / |y_dense|: a score scale is right for the norm where this is 1

Norms are Frobenius norms over all sampled tokens. n tokens, h hidden size, E experts, m their
width, r the width of the shared (residual) expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

_BLOCK = 2048
"""Neurons whose activations are in memory at a time."""


@dataclass(frozen=True)
class Routing:
    """How a layer weighs its experts, as its model.yaml says."""

    topk: int
    score_scale: float
    xft: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """XFT's rule (`model.xft.xft_weights`) where it weighs the experts; none: a shared one weighs
    1.
    """


@dataclass(frozen=True)
class MoeLayer:
    """The weights of a mixture's layer, of any floating type."""

    router: Tensor
    """[E, h]"""
    fc1: Tensor
    """[E, 2m, h]: gate rows, then up rows."""
    fc2: Tensor
    """[E, h, m]"""
    router_out: Tensor | None = None
    """[E, E] of the mlp gate."""
    shared_fc1: Tensor | None = None
    """[2r, h]"""
    shared_fc2: Tensor | None = None
    """[h, r]"""


@dataclass(frozen=True)
class Measures:
    """What was measured in one layer."""

    error: float
    error_all: float
    norm_ratio: float
    loads: list[float]
    """Share of the n k choices that fell on each expert; they sum to 1."""

    @property
    def imbalance(self) -> float:
        """Largest load over the mean load."""
        return max(self.loads) * len(self.loads)


@torch.no_grad()
def measure(x: Tensor, dense: Tensor, layer: MoeLayer, routing: Routing, equal: float) -> Measures:
    """Compare a mixture's layer with the dense FFN.

    Args:
        x: [n, h] inputs.
        dense: [n, h], the FFN's outputs for them (`swiglu`).
        layer: the mixture's weights.
        routing: the mixture's routing.
        equal: weight of each expert when all are chosen (`equal_weight`); not used with XFT's rule,
            which gives equal logits their weights itself.
    """
    x = x.to(dense.dtype)
    logits = linear(x, layer.router.to(x.dtype))
    if layer.router_out is not None:
        logits = linear(torch.tanh(logits), layer.router_out.to(x.dtype))
    experts = logits.shape[1]
    weights, shared, chosen = routing_weights(logits, routing)
    if routing.xft:
        everyone = Routing(experts, routing.score_scale, routing.xft)
        all_weights, all_shared, _ = routing_weights(torch.zeros_like(logits[:1]), everyone)
    else:
        all_weights, all_shared = torch.full_like(logits[:1], equal), shared[:1]
    routed, everything = torch.zeros_like(dense), torch.zeros_like(dense)
    for expert in range(experts):
        gate, up = layer.fc1[expert].chunk(2)
        output = swiglu(x, gate, up, layer.fc2[expert])
        routed += weights[:, expert : expert + 1] * output
        everything += all_weights[:, expert : expert + 1] * output
    if layer.shared_fc1 is not None and layer.shared_fc2 is not None:
        gate, up = layer.shared_fc1.chunk(2)
        output = swiglu(x, gate, up, layer.shared_fc2)
        routed += shared * output
        everything += all_shared * output
    loads = chosen.double().mean(0) / routing.topk
    size = _norm(dense)
    return Measures(
        error=_norm(routed - dense) / size,
        error_all=_norm(everything - dense) / size,
        norm_ratio=_norm(routed) / size,
        loads=loads.tolist(),
    )


def routing_weights(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """What our router makes of logits [n, E], in evaluation mode.

    Returns:
        Weights of the experts [n, E], zero where not chosen, with the score scale; weight of a
        shared expert [n, 1]; chosen [n, E] bool.
    """
    best = logits.topk(routing.topk, dim=1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)
    if routing.xft:
        weights, shared = routing.xft(logits, chosen)
        return weights, shared[:, None], chosen
    # A single chosen expert would always get 1: it gets its share of all instead.
    candidates = logits if routing.topk == 1 else logits.masked_fill(~chosen, -torch.inf)
    weights = candidates.softmax(1).masked_fill(~chosen, 0.0) * routing.score_scale
    return weights, torch.ones_like(logits[:, :1]), chosen


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down (silu(gate x) * up x) in x's type, some neurons at a time.

    Args:
        x: [n, h]
        gate, up: [d, h]
        down: [h, d]
    """
    result = torch.zeros(len(x), down.shape[0], dtype=x.dtype)
    for start in range(0, len(gate), _BLOCK):
        part = slice(start, start + _BLOCK)
        inner = silu(linear(x, gate[part].to(x.dtype))) * linear(x, up[part].to(x.dtype))
        result += linear(inner, down[:, part].to(x.dtype))
    return result


def equal_weight(num_experts: int, width: int, d_ffn: int, residual: int = 0) -> float:
    """Weight with which all experts of a partition together count every neuron once on average.

    Args:
        num_experts, width: E, m.
        d_ffn: neurons of the dense FFN.
        residual: neurons of them that an always-on expert has.

    Returns:
        (d_ffn - residual) / (E m): 1 where the experts are disjoint and complete.
    """
    return (d_ffn - residual) / (num_experts * width)


def overlap(neurons: Tensor) -> float:
    """Mean Jaccard index |a n b| / |a u b| over all pairs of experts.

    Args:
        neurons: map [E, m], no neuron twice in an expert.

    Returns:
        0 where experts are disjoint, 1 where all are the same.
    """
    experts, width = neurons.shape
    if experts == 1:
        return 0.0
    has = torch.zeros(experts, int(neurons.max()) + 1)
    has.scatter_(1, neurons, 1.0)
    common = has @ has.T
    index = (common / (2 * width - common)).double()
    return float((index.sum() - index.diagonal().sum()) / (experts * (experts - 1)))


def _norm(values: Tensor) -> float:
    return float(values.norm(dtype=torch.float64))
