"""Every way of cutting a dense FFN into experts, under its name and behind one interface.

A method is asked for the neuron map of one layer at a time. What it needs to know of the layer, and
which options it takes, stands in METHODS, so that what is missing is said before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from megatron_ext.construction import partition
from megatron_ext.construction.clustering import balanced_kmeans
from megatron_ext.construction.coactivation import co_activation
from megatron_ext.construction.importance_split import greedy, shared_neurons, top
from megatron_ext.construction.partition import NeuronMap
from megatron_ext.construction.routers import RouterInit
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.construction.statistics import LayerStatistics, Statistics


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is asked for: the same in every layer."""

    method: str
    d_ffn: int
    num_experts: int
    seed: int
    expert_width: int | None = None
    """m; none: d_h / E, or d_h / (E + R) with residual blocks."""
    num_residual: int = 0
    """R: blocks of m neurons that are always on."""
    cluster_by: Literal["up", "gate", "down"] = "up"
    metric: Literal["l2", "cosine"] = "l2"
    importance: Literal["feature_change", "feature_grad"] = "feature_change"
    share: bool = False
    """Whether routed experts may overlap beside a residual expert."""

    @property
    def width(self) -> int:
        """m."""
        if self.expert_width is not None:
            return self.expert_width
        return self.d_ffn // (self.num_experts + self.num_residual)

    @property
    def complete(self) -> bool:
        """Whether the experts have every neuron exactly once, so that together they are the FFN."""
        overlap = METHODS[self.method].overlaps
        return not (overlap == "always" or (overlap == "if shared" and self.share))


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer as methods see it; weights are read when they are asked for."""

    index: int
    gate_up: Callable[[], tuple[Tensor, Tensor]]
    """-> gate, up [d_h, h]"""
    down: Callable[[], Tensor]
    """-> down [h, d_h]"""
    statistics: LayerStatistics | None = None


@dataclass(frozen=True)
class Method:
    """One way of choosing neurons."""

    choose: Callable[[DenseLayer, Split], NeuronMap]
    options: frozenset[str] = frozenset()
    """Fields of Split that it looks at, beside those that all methods do."""
    statistics: frozenset[str] = frozenset()
    """What it needs of a layer's statistics."""
    overlaps: Literal["never", "if shared", "always"] = "never"
    """Whether a neuron may be in several experts, or in none."""
    num_residual: int = 0
    """R where it is not given, and the least R."""
    router_init: RouterInit = "normal"
    """Start of the routers where it is not given."""


def _random(layer: DenseLayer, split: Split) -> NeuronMap:
    map_ = partition.independent_random(split.d_ffn, split.num_experts, split.seed, layer.index)
    return NeuronMap(map_)


def _contiguous(layer: DenseLayer, split: Split) -> NeuronMap:
    return NeuronMap(partition.contiguous(split.d_ffn, split.num_experts))


def _clustering(layer: DenseLayer, split: Split) -> NeuronMap:
    """LLaMA-MoE, "Independent-Clustering": by the directions of a matrix's vectors."""
    if split.cluster_by == "down":
        vectors = layer.down().T
    else:
        gate, up = layer.gate_up()
        vectors = up if split.cluster_by == "up" else gate
    if split.metric == "l2":
        vectors = normalize(vectors.float())
    labels, _ = balanced_kmeans(vectors, split.num_experts, _layer_seed(split, layer), split.metric)
    return NeuronMap(labels.argsort(stable=True).view(split.num_experts, -1))


def _co_activation(layer: DenseLayer, split: Split) -> NeuronMap:
    inputs = _known(layer, "inputs")
    seed = _layer_seed(split, layer)
    return NeuronMap(co_activation(*layer.gate_up(), inputs, split.num_experts, seed))


def _gradient(layer: DenseLayer, split: Split) -> NeuronMap:
    return NeuronMap(greedy(_importance(layer, split), split.width))


def _sharing_inner(layer: DenseLayer, split: Split) -> NeuronMap:
    return NeuronMap(top(_importance(layer, split), split.width))


def _sharing_inter(layer: DenseLayer, split: Split) -> NeuronMap:
    return _residual(_importance(layer, split), split)


def _gradient_split_plus(layer: DenseLayer, split: Split) -> NeuronMap:
    """LLaMA-MoE v2: importance is the mean over a cluster's tokens, where v1 has the sum."""
    tokens = _known(layer, "tokens").clamp(min=1).double().numpy()
    return _residual(_importance(layer, split) / tokens[:, None], split)


def _residual(importance: np.ndarray, split: Split) -> NeuronMap:
    residual = shared_neurons(importance, split.width, split.num_residual * split.width)
    free = np.ones(split.d_ffn, dtype=bool)
    free[residual.numpy()] = False
    choose = top if split.share else greedy
    return NeuronMap(choose(importance, split.width, free), residual)


METHODS: dict[str, Method] = {
    "independent_random": Method(_random),
    "contiguous": Method(_contiguous),
    "independent_clustering": Method(_clustering, frozenset({"cluster_by", "metric"})),
    "co_activation": Method(_co_activation, statistics=frozenset({"inputs"})),
    "gradient": Method(_gradient, frozenset({"importance"}), frozenset({"importance"})),
    "sharing_inner": Method(
        _sharing_inner,
        frozenset({"importance", "expert_width"}),
        frozenset({"importance"}),
        overlaps="always",
    ),
    "sharing_inter": Method(
        _sharing_inter,
        frozenset({"importance", "expert_width", "num_residual", "share"}),
        frozenset({"importance"}),
        overlaps="if shared",
        num_residual=1,
    ),
    "gradient_split_plus": Method(
        _gradient_split_plus,
        frozenset({"importance", "num_residual"}),
        frozenset({"importance"}),
        num_residual=1,
        router_init="centroids",
    ),
}


def neuron_map(layer: DenseLayer, split: Split) -> NeuronMap:
    """The neurons of every expert of a layer.

    Args:
        layer: the dense layer, with statistics where the method needs them.
        split: what is asked for; `check` has passed it.

    Raises:
        UserError: the layer's statistics lack what the method needs.
    """
    map_ = METHODS[split.method].choose(layer, split)
    assert map_.experts.shape == (split.num_experts, split.width)
    assert map_.is_complete(split.d_ffn) or not split.complete
    return map_


def check(split: Split, given: set[str]) -> None:
    """Refuse what cannot work, before any work.

    Args:
        split: what is asked for.
        given: options that the user set, of those that not every method has.

    Raises:
        UserError: an option that the method does not have, or neurons that do not add up.
    """
    method, name = METHODS[split.method], split.method
    for option in sorted(given - method.options):
        having = [other for other, m in METHODS.items() if option in m.options]
        raise UserError(
            f"method {name} has no option {option}", f"methods that have it: {', '.join(having)}"
        )
    if split.seed < 0:
        raise UserError(f"seed={split.seed} must not be negative")
    if split.num_residual < method.num_residual:
        raise UserError(f"num_residual={split.num_residual}: method {name} needs at least 1")
    experts, residual, width = split.num_experts, split.num_residual, split.expert_width
    if split.complete or width is None:
        whole = partition.expert_width(split.d_ffn, experts, residual)
        if width not in (None, whole):
            raise UserError(
                f"expert_width={width} times {experts + residual} experts and residual blocks is "
                f"not ffn_hidden_size={split.d_ffn}",
                f"leave expert_width out (it is {whole}), or let experts overlap",
            )
    elif width < 1 or (residual + 1) * width > split.d_ffn:
        beside = f" beside num_residual={residual}" if residual else ""
        raise UserError(
            f"expert_width={width}{beside} does not fit into ffn_hidden_size={split.d_ffn}"
        )


def check_statistics(split: Split, statistics: Statistics | None) -> None:
    """Refuse a method without the statistics that it needs.

    Raises:
        UserError: they are missing, or of another number of groups.
    """
    method = METHODS[split.method]
    if not method.statistics:
        return
    if statistics is None:
        needed = ", ".join(sorted(_field(name, split) for name in method.statistics))
        raise UserError(
            f"method {split.method} needs statistics of the dense model ({needed})",
            "collect them with tools/collect_statistics.py and name them with --statistics",
        )
    groups = len(statistics.groups)
    if "importance" in method.statistics and groups != split.num_experts:
        raise UserError(
            f"the statistics have {groups} groups of data, num_experts={split.num_experts}: method "
            f"{split.method} makes an expert of each group",
            f"collect statistics of {split.num_experts} groups, or set num_experts={groups}",
        )


def _field(name: str, split: Split) -> str:
    """Field of LayerStatistics that holds what a method calls `name`."""
    return "gradient" if name == "importance" and split.importance == "feature_grad" else name


def _importance(layer: DenseLayer, split: Split) -> np.ndarray:
    return np.asarray(_known(layer, _field("importance", split)), dtype=np.float64)


def _known(layer: DenseLayer, name: str) -> Tensor:
    value: Tensor | None = getattr(layer.statistics, name)
    if value is None:
        raise UserError(
            f"the statistics hold no {name} of layer {layer.index}", "collect them with it"
        )
    return value


def _layer_seed(split: Split, layer: DenseLayer) -> int:
    """Another seed for every layer: 31 bits, as METIS takes them."""
    state = np.random.SeedSequence((split.seed, layer.index)).generate_state(1)
    return int(state[0]) >> 1
