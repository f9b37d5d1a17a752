"""Where a layer's router starts.

    normal      N(0, std) in every weight, as LLaMA-MoE
    zero        all experts alike: equal logits for every token
    data        row e: mean of what the router sees (the MLP's input) in texts of group e, as a unit
                vector
    centroids   row e: centroid e of a k-means over the same hidden states (LLaMA-MoE v2)

Logits that all experts have in common change neither the choice of k nor a softmax over logits. So
what the rows of `data` and `centroids` have in common is taken out of them (hidden states of all
texts share most of their direction), and they are scaled together until a weight's root mean square
is `std`: the one knob for how sharply any router starts. The choice is that of the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.construction.statistics import Statistics

RouterInit = Literal["normal", "zero", "data", "centroids"]
FROM_STATISTICS = ("data", "centroids")


def router_weights(
    num_experts: int,
    hidden: int,
    gate: Literal["linear", "mlp"],
    init: RouterInit,
    std: float,
    seed: int,
    layer: int,
    statistics: Statistics | None = None,
    repeats: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Start of a layer's router.

    Args:
        num_experts: E.
        hidden: h.
        gate: `linear`, or LLaMA-MoE's `mlp`.
        init: see above.
        std: size of the weights.
        seed: of a normal start, anew for every (seed, layer).
        layer: number of the layer, from 0.
        statistics: what `data` and `centroids` look at (see `check_router_start`).
        repeats: G neighbouring experts share a row and so a logit: the shards of one replica
            (virtual groups, arXiv 2410.07524).

    Returns:
        `router.weight` [E, h] and, for the mlp gate, `router.gate_out` [E, E] (else None), fp32.
    """
    rows = num_experts // repeats
    assert rows * repeats == num_experts
    if init in FROM_STATISTICS:
        assert statistics is not None and gate == "linear"
        rows_seen = _seen(statistics, init, layer).double()
        if init == "data":
            rows_seen = rows_seen / rows_seen.norm(dim=1, keepdim=True)
        return _spread(rows_seen, std).repeat_interleave(repeats, 0), None
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, layer, 1))))

    def draw(width: int) -> Tensor:
        if init == "zero":
            return torch.zeros(num_experts, width)
        weights = torch.from_numpy(generator.standard_normal((rows, width), dtype=np.float32))
        return (weights * std).repeat_interleave(repeats, 0)

    first = draw(hidden)
    return first, draw(num_experts) if gate == "mlp" else None


def check_router_start(
    init: RouterInit,
    gate: Literal["linear", "mlp"],
    num_experts: int,
    layers: Iterable[int],
    statistics: Statistics | None = None,
    repeats: int = 1,
) -> None:
    """Check before any work that `router_weights` can make every layer's router.

    Raises:
        UserError: statistics are missing, were not asked for, or are of another number of groups;
            a gate that has no rows in hidden space; replicas that nothing tells apart.
    """
    if init == "zero" and repeats > 1:
        raise UserError(
            "router_init=zero cannot tell replicas apart: the chosen experts would not be whole "
            "groups of shards",
            "use router_init normal, data or centroids",
        )
    if init not in FROM_STATISTICS:
        if statistics is not None:
            raise UserError(
                f"router_init={init} looks at no statistics", "set router_init data or centroids"
            )
        return
    if statistics is None:
        raise UserError(f"router_init={init} needs statistics", "name their directory")
    if gate != "linear":
        raise UserError(
            f"router_init={init} needs moe_gate=linear: the rows of moe_gate={gate} are no "
            "directions of hidden states"
        )
    for layer in layers:
        found = _seen(statistics, init, layer).shape[0]
        if found * repeats != num_experts:
            raise UserError(
                f"the statistics hold {found} {'groups' if init == 'data' else 'centroids'}, "
                f"the routers need {num_experts // repeats}",
                f"collect them over {num_experts // repeats} groups, or change num_experts",
            )


def _seen(statistics: Statistics, init: RouterInit, layer: int) -> Tensor:
    found = statistics.layer(layer)
    rows = found.input_mean if init == "data" else found.centroids
    if rows is None:
        raise UserError(
            f"the statistics hold no centroids of layer {layer}", "collect them with k-means"
        )
    if not rows.any(dim=1).all():
        raise UserError(
            f"a group of the statistics has no tokens in layer {layer}", "leave that group out"
        )
    return rows


def _spread(rows: Tensor, std: float) -> Tensor:
    """Rows [C, h] less their mean, scaled to a root mean square of `std` (fp32)."""
    spread = rows - rows.mean(0)
    size = spread.square().mean().sqrt()
    if not size > 1e-9 * rows.abs().max():
        raise UserError(
            "the groups of the statistics have the same mean hidden state",
            "use texts that differ, or router_init normal",
        )
    return (spread * (std / size)).float()
