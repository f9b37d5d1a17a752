"""Every method through the one interface that the command and reports use."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from megatron_ext.construction import partition
from megatron_ext.construction.clustering import balanced_kmeans, inertia
from megatron_ext.construction.methods import (
    METHODS,
    DenseLayer,
    Split,
    check,
    check_statistics,
    neuron_map,
)
from megatron_ext.construction.statistics import LayerStatistics
from megatron_ext.errors import UserError

D_FFN, HIDDEN, EXPERTS = 48, 10, 4


def layer_of(num_groups: int, index: int = 0) -> DenseLayer:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate, up, down = draw(D_FFN, HIDDEN), draw(D_FFN, HIDDEN), draw(HIDDEN, D_FFN)
    statistics = LayerStatistics(
        tokens=torch.arange(1, num_groups + 1) * 10,
        input_mean=draw(num_groups, HIDDEN).double(),
        importance=draw(num_groups, D_FFN).abs().double(),
        gradient=draw(num_groups, D_FFN).abs().double(),
        inputs=draw(100, HIDDEN),
        centroids=draw(num_groups, HIDDEN),
    )
    return DenseLayer(index, lambda: (gate, up), lambda: down, statistics)


def split_of(method: str, **options: Any) -> Split:
    values = {"d_ffn": D_FFN, "num_experts": EXPERTS, "seed": 3}
    values["num_residual"] = METHODS[method].num_residual
    if METHODS[method].num_residual:
        values["num_experts"] = EXPERTS - 1
    return Split(method=method, **{**values, **options})


def map_of(split: Split, index: int = 0) -> partition.NeuronMap:
    check(split, set())
    return neuron_map(layer_of(split.num_experts, index), split)


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_as_large_as_promised(method: str) -> None:
    split = split_of(method)
    map_ = map_of(split)
    assert split.width == D_FFN // EXPERTS
    assert map_.experts.shape == (split.num_experts, split.width)
    assert map_.residual.shape == (split.num_residual * split.width,)
    for neurons in [*map_.experts, map_.residual]:
        assert neurons.dtype == torch.long and torch.equal(neurons, neurons.unique())
    assert map_.is_complete(D_FFN) == split.complete
    again = map_of(split)
    assert torch.equal(map_.experts, again.experts) and torch.equal(map_.residual, again.residual)


@pytest.mark.parametrize("method", ["independent_random", "independent_clustering"])
def test_seed_and_layer_decide(method: str) -> None:
    first = map_of(split_of(method)).experts
    assert not torch.equal(first, map_of(split_of(method), index=1).experts)
    assert not torch.equal(first, map_of(split_of(method, seed=4)).experts)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("matrix", ["up", "gate", "down"])
def test_clustering_groups_what_it_is_told_to(matrix: str, metric: str) -> None:
    map_ = map_of(split_of("independent_clustering", cluster_by=matrix, metric=metric))
    layer = layer_of(EXPERTS)
    gate, up = layer.gate_up()
    vectors = {"up": up, "gate": gate, "down": layer.down().T}
    if metric == "cosine":
        vectors = {name: v - v.mean(dim=0) for name, v in vectors.items()}
    labels = torch.empty(D_FFN, dtype=torch.long)
    for expert, neurons in enumerate(map_.experts):
        labels[neurons] = expert
    closeness = {name: inertia(normalize(v), labels) for name, v in vectors.items()}
    assert min(closeness, key=lambda name: closeness[name]) == matrix
    other = balanced_kmeans(normalize(vectors[matrix]), EXPERTS, 99)[0]
    assert closeness[matrix] < 1.1 * inertia(normalize(vectors[matrix]), other)


def test_importance_is_read_from_the_field_that_was_chosen() -> None:
    layer = layer_of(EXPERTS)
    assert layer.statistics is not None
    for importance, values in (
        ("feature_change", layer.statistics.importance),
        ("feature_grad", layer.statistics.gradient),
    ):
        assert values is not None
        map_ = map_of(split_of("sharing_inner", expert_width=7, importance=importance))
        assert torch.equal(map_.experts, values.topk(7).indices.sort().values)


def test_only_v2_divides_by_the_tokens_of_a_group() -> None:
    # Group 0 has the larger sums, group 1 the larger means: who gets the neurons both want?
    importance = torch.tensor([[10.0, 9, 8, 7, 6, 1], [4, 3, 2.9, 2, 1, 1]]).double()
    tokens = torch.tensor([100, 1])
    layer = dataclasses.replace(
        layer_of(2),
        statistics=LayerStatistics(tokens, torch.zeros(2, HIDDEN), importance=importance),
    )
    maps = {
        method: neuron_map(layer, split_of(method, d_ffn=6, num_experts=2))
        for method in ("sharing_inter", "gradient_split_plus")
    }
    for map_ in maps.values():
        assert map_.residual.tolist() == [0, 1]
    assert maps["sharing_inter"].experts.tolist() == [[2, 3], [4, 5]]
    assert maps["gradient_split_plus"].experts.tolist() == [[4, 5], [2, 3]]


def test_sharing_experts_overlap_beside_the_residual_one() -> None:
    split = split_of("sharing_inter", share=True, expert_width=10, num_residual=2)
    map_ = map_of(split)
    assert not split.complete and map_.experts.shape == (3, 10) and len(map_.residual) == 20
    assert not set(map_.residual.tolist()) & set(map_.experts.reshape(-1).tolist())
    assert len(map_.experts.unique()) < 30  # 28 are left


@pytest.mark.parametrize(
    ("method", "options", "given", "message"),
    [
        ("contiguous", {"num_experts": 5}, set(), "=48 is not a multiple of num_experts=5"),
        ("gradient", {"num_experts": 0}, set(), "not a multiple of num_experts=0"),
        ("sharing_inter", {"num_experts": 4}, set(), "num_experts=4 \\+ num_residual=1"),
        ("sharing_inter", {"num_residual": 0}, set(), "needs at least 1"),
        ("sharing_inter", {"expert_width": 11}, set(), "expert_width=11 times 4 experts"),
        ("sharing_inter", {"expert_width": 25, "share": True}, set(), "does not fit"),
        ("sharing_inner", {"expert_width": 49}, set(), "expert_width=49 does not fit"),
        ("sharing_inner", {"expert_width": 0}, set(), "expert_width=0 does not fit"),
        ("gradient", {}, {"cluster_by"}, "gradient has no option cluster_by"),
        ("gradient", {"seed": -1}, set(), "seed=-1"),
    ],
)
def test_what_cannot_work_is_refused(
    method: str, options: dict[str, Any], given: set[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(split_of(method, **options), given)


class Groups:
    def __init__(self, count: int) -> None:
        self.groups = [str(group) for group in range(count)]


def test_statistics_must_be_there_and_fit() -> None:
    check_statistics(split_of("independent_clustering"), None)
    check_statistics(split_of("co_activation"), Groups(17))  # type: ignore[arg-type]
    check_statistics(split_of("gradient"), Groups(4))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"needs statistics of the dense model \(gradient\)"):
        check_statistics(split_of("sharing_inner", importance="feature_grad"), None)
    with pytest.raises(UserError, match="statistics have 5 groups of data, num_experts=4"):
        check_statistics(split_of("gradient"), Groups(5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "missing"), [("gradient", "importance"), ("co_activation", "inputs")]
)
def test_missing_data_is_named(method: str, missing: str) -> None:
    layer = layer_of(EXPERTS, index=6)
    assert layer.statistics is not None
    less = dataclasses.replace(layer.statistics, **{missing: None})
    with pytest.raises(UserError, match=f"the statistics hold no {missing} of layer 6"):
        neuron_map(dataclasses.replace(layer, statistics=less), split_of(method))
