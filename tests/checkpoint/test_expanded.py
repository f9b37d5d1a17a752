"""Checkpoints and merged children as experts, tensor by tensor."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.checkpoint.expanded import (
    ExpandedWeights,
    MeanWeights,
    check_checkpoints,
    delta_grams,
)
from megatron_ext.checkpoint.tensors import (
    EMBEDDING,
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FC2,
    MLP_NORM,
    ROUTER,
    layer_key,
    tensor_shapes,
)
from megatron_ext.checkpoint.upcycled import MergedWeights
from megatron_ext.checkpoint.writer import write_weights
from megatron_ext.config import ModelConfig
from megatron_ext.construction.expansion import Child, Merge
from megatron_ext.construction.routers import router_weights
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import RandomWeights, small_model

DENSE = small_model()
CHILDREN = [Child((0, 2), 0.3), Child((1, 3), 0.6)]


class Tuned(RandomWeights):
    """A checkpoint of a run that started from `RandomWeights`."""

    def __init__(self, step: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(DENSE, dtype)
        self.step = step

    def tensor(self, key: str) -> Tensor:
        start = super().tensor(key).float()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.step} {key}".encode()))
        change = torch.randn(start.shape, generator=generator) * 0.01 * self.step
        return (start + change).to(self.dtype)


def mixture(experts: int = 5, **options: Any) -> ModelConfig:
    return dataclasses.replace(
        DENSE, num_experts=experts, moe_ffn_hidden_size=96, **{"moe_layer_freq": 2, **options}
    )


def expanded(
    merge: Merge | None = None,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
    children: list[Child] | None = None,
) -> ExpandedWeights:
    checkpoints = [Tuned(step, dtype) for step in (1, 2, 3)]
    plan = CHILDREN if children is None else children
    return ExpandedWeights(
        RandomWeights(DENSE, dtype),
        checkpoints,
        checkpoints[-1],
        mixture(3 + len(plan)),
        dict.fromkeys((0, 2), plan),
        merge or Merge(),
        seed,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_are_experts_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = expanded(dtype=dtype)
    for expert, step in enumerate((1, 2, 3)):
        for name, source in ((EXPERTS_FC1, FC1), (EXPERTS_FC2, FC2)):
            found = weights.tensor(layer_key(2, name))[expert]
            assert torch.equal(found, Tuned(step, dtype).tensor(layer_key(2, source)))
    shared = tensor_shapes(DENSE).keys() & tensor_shapes(weights.model).keys()
    assert {EMBEDDING, layer_key(0, MLP_NORM), layer_key(1, FC1)} <= shared
    assert all(torch.equal(weights.tensor(key), Tuned(3, dtype).tensor(key)) for key in shared)
    assert torch.equal(weights.gate_up(1)[1], Tuned(3, dtype).gate_up(1)[1])
    router, _ = router_weights(5, 48, "linear", "normal", 0.02, 3, 2)
    assert torch.equal(weights.tensor(layer_key(2, ROUTER)), router)
    write_weights(tmp_path / "w", weights)  # shapes are the model's


@pytest.mark.parametrize("merge", [Merge("task_arithmetic", scale=0.9), Merge("average")], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)
def test_children_are_the_base_plus_merged_deltas(
    merge: Merge, dtype: torch.dtype, bound: float
) -> None:
    weights = expanded(merge, dtype=dtype)
    for name, source in ((EXPERTS_FC1, FC1), (EXPERTS_FC2, FC2)):
        key = layer_key(2, source)
        base = RandomWeights(DENSE, dtype).tensor(key).double()
        found = weights.tensor(layer_key(2, name)).double()
        for number, child in enumerate(CHILDREN):
            deltas = [found[parent] - base for parent in child.parents]
            if merge.method == "average":
                expected = base + (deltas[0] + deltas[1]) / 2
            else:
                expected = base + 0.9 * (child.alpha * deltas[0] + (1 - child.alpha) * deltas[1])
            torch.testing.assert_close(found[3 + number], expected, rtol=bound, atol=bound)


def test_dare_and_ties_change_some_entries_only() -> None:
    base = RandomWeights(DENSE).tensor(layer_key(0, FC2))
    child = [Child((1, 2), 0.5)]
    dare = expanded(Merge("dare", 0.9), children=child).tensor(layer_key(0, EXPERTS_FC2))[3]
    assert float((dare == base).double().mean()) == pytest.approx(0.81, abs=0.02)
    ties = expanded(Merge("ties", share=0.1), children=child).tensor(layer_key(0, EXPERTS_FC2))[3]
    changed = float((ties != base).double().mean())
    assert 0.1 <= changed <= 0.2


def test_children_of_the_same_parents_have_their_own_masks() -> None:
    twins = [Child((1, 2), 0.5)] * 2
    dare = expanded(children=twins).tensor(layer_key(0, EXPERTS_FC2))
    assert not torch.equal(dare[3], dare[4])
    average = expanded(Merge("average"), children=twins).tensor(layer_key(0, EXPERTS_FC2))
    assert torch.equal(average[3], average[4])


def test_a_tensor_does_not_depend_on_when_it_is_asked_for() -> None:
    forwards, backwards, others = expanded(), expanded(), expanded(seed=4)
    keys = list(tensor_shapes(forwards.model))
    first = {key: forwards.tensor(key) for key in keys}
    assert all(torch.equal(first[key], backwards.tensor(key)) for key in reversed(keys))
    for name in (EXPERTS_FC1, EXPERTS_FC2):
        one, other = first[layer_key(0, name)], others.tensor(layer_key(0, name))
        assert torch.equal(one[:3], other[:3])
        assert not torch.equal(one[3], other[3]) and not torch.equal(one[4], other[4])


def test_only_what_a_tensor_is_made_of_is_read() -> None:
    base, checkpoints = RandomWeights(DENSE), [Tuned(1), Tuned(2)]
    plan = dict.fromkeys((0, 2), [Child((0, 1), 0.5), Child((0, 2), 0.5), Child((1, 3), 0.5)])
    weights = ExpandedWeights(base, checkpoints, checkpoints[1], mixture(5), plan, Merge(), 0)
    weights.tensor(layer_key(2, EXPERTS_FC2))
    assert all(model.asked == [layer_key(2, FC2)] for model in (base, *checkpoints))


@pytest.mark.parametrize("merge", [Merge(), Merge("ties"), Merge("average")], ids=str)
def test_identical_checkpoints_make_identical_experts(merge: Merge) -> None:
    """The base too: nothing was learnt, so nothing can be dropped or rescaled."""
    base = RandomWeights(DENSE)
    plan = dict.fromkeys((0, 2), CHILDREN)
    weights = ExpandedWeights(base, [base] * 3, base, mixture(), plan, merge, 0)
    for name, source in ((EXPERTS_FC1, FC1), (EXPERTS_FC2, FC2)):
        experts = weights.tensor(layer_key(2, name))
        assert all(torch.equal(e, base.tensor(layer_key(2, source))) for e in experts)


def test_means_are_taken_in_fp32() -> None:
    models = [Tuned(step, torch.bfloat16) for step in (1, 2, 3, 4, 5)]
    key = layer_key(1, FC2)
    exact = torch.stack([m.tensor(key).double() for m in models]).mean(0)
    assert torch.equal(MeanWeights(models).tensor(key), exact.float().bfloat16())
    gate, up = MeanWeights(models).gate_up(1)
    assert torch.equal(torch.cat((gate, up)), MeanWeights(models).tensor(layer_key(1, FC1)))


def test_grams_are_of_the_ffns_deltas() -> None:
    checkpoints, base = [Tuned(1), Tuned(2), Tuned(3)], RandomWeights(DENSE)
    grams = delta_grams(base, checkpoints, [0, 2])
    assert list(grams) == [0, 2]
    keys = [layer_key(2, FC1), layer_key(2, FC2)]
    flat = torch.stack(
        [
            torch.cat([(c.tensor(key).double() - base.tensor(key)).flatten() for key in keys])
            for c in checkpoints
        ]
    )
    torch.testing.assert_close(grams[2], flat @ flat.T, rtol=1e-12, atol=1e-12)


def test_one_hot_merging_gives_a_checkpoint_back() -> None:
    """The last one, whose other weights the mixture has."""
    dense = MergedWeights(expanded(), coefficients=[[0.0, 0.0, 1e4, 0.0, 0.0]] * 2)
    for key in tensor_shapes(DENSE):
        assert torch.equal(dense.tensor(key), Tuned(3).tensor(key)), key


def test_an_expert_that_is_not_its_checkpoint_is_found() -> None:
    check_checkpoints(expanded(), [Tuned(1), Tuned(2), Tuned(3)])
    with pytest.raises(UserError, match="of expert 1 in layer 0 is not its checkpoint's"):
        check_checkpoints(expanded(), [Tuned(1), Tuned(3), Tuned(2)])
