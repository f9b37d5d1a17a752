"""Upcycled and merged weights, tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FC2,
    ROUTER,
    SHARED_FC1,
    SHARED_FC2,
    layer_key,
    tensor_shapes,
)
from megatron_ext.checkpoint.upcycled import MergedWeights, UpcycledWeights, check_sources
from megatron_ext.checkpoint.writer import write_weights
from megatron_ext.config import ModelConfig
from megatron_ext.construction.routers import router_weights
from megatron_ext.construction.upcycling import Alteration, replica_map
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import RandomWeights, small_model

DENSE = small_model()


class Shifted(RandomWeights):
    """Another model of the same shape."""

    def __init__(self, shift: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(DENSE, dtype)
        self.shift = shift

    def tensor(self, key: str) -> Tensor:
        return super().tensor(key) + self.shift


def mixture(experts: int, width: int = 96, **options: Any) -> ModelConfig:
    return dataclasses.replace(
        DENSE, num_experts=experts, moe_ffn_hidden_size=width, **{"moe_layer_freq": 2, **options}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_shards_are_the_dense_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model, dense = mixture(6, width=32), RandomWeights(DENSE, dtype)
    weights = UpcycledWeights([dense], model, replica_map(96, 3, 6), Alteration(seed=5), repeats=3)
    assert model.moe_layers == [0, 2]
    for key in tensor_shapes(DENSE).keys() & tensor_shapes(model).keys():
        assert torch.equal(weights.tensor(key), dense.tensor(key)), key
    gate, up = dense.gate_up(2)
    down = dense.tensor(layer_key(2, FC2))
    fc1, fc2 = weights.tensor(layer_key(2, EXPERTS_FC1)), weights.tensor(layer_key(2, EXPERTS_FC2))
    for expert in range(6):
        rows = slice(32 * (expert % 3), 32 * (expert % 3) + 32)
        assert torch.equal(fc1[expert], torch.cat((gate[rows], up[rows])))
        assert torch.equal(fc2[expert], down[:, rows])
    router, _ = router_weights(6, 48, "linear", "normal", 0.02, 5, 2, repeats=3)
    assert torch.equal(weights.tensor(layer_key(2, ROUTER)), router)
    assert torch.equal(weights.gate_up(1)[1], dense.gate_up(1)[1])
    write_weights(tmp_path / "w", weights)  # shapes are the model's


def test_branch_train_mix_averages_all_but_experts() -> None:
    models = [Shifted(0.0), Shifted(1.0), Shifted(5.0)]
    weights = UpcycledWeights(models, mixture(6), replica_map(96, 1, 6), Alteration())
    dense = RandomWeights(DENSE)
    shared = tensor_shapes(DENSE).keys() & tensor_shapes(weights.model).keys()
    assert layer_key(1, FC1) in shared
    for key in shared:
        torch.testing.assert_close(weights.tensor(key), dense.tensor(key) + 2.0)
    for expert, shift in enumerate((0.0, 0.0, 1.0, 1.0, 5.0, 5.0)):
        for name, source in ((EXPERTS_FC1, FC1), (EXPERTS_FC2, FC2)):
            expected = dense.tensor(layer_key(0, source)) + shift
            assert torch.equal(weights.tensor(layer_key(0, name))[expert], expected)


def test_averages_are_taken_in_fp32() -> None:
    """Sums of 16-bit values in their own type would round at every step."""
    models = [Shifted(shift, torch.bfloat16) for shift in (0.0, 0.37, 0.11, 0.05, 0.9)]
    weights = UpcycledWeights(models, mixture(5), replica_map(96, 1, 5), Alteration())
    key = layer_key(1, FC2)
    exact = torch.stack([m.tensor(key).double() for m in models]).mean(0)
    assert torch.equal(weights.tensor(key), exact.float().bfloat16())


def test_a_base_model_gives_all_but_experts() -> None:
    models, base = [Shifted(1.0), Shifted(2.0)], Shifted(7.0)
    weights = UpcycledWeights(models, mixture(2), replica_map(96, 1, 2), Alteration(), base=base)
    assert torch.equal(weights.tensor(layer_key(1, FC1)), base.tensor(layer_key(1, FC1)))
    found = weights.tensor(layer_key(0, EXPERTS_FC2))[1]
    assert torch.equal(found, models[1].tensor(layer_key(0, FC2)))


def test_a_tensor_does_not_depend_on_when_it_is_asked_for() -> None:
    def make() -> UpcycledWeights:
        alteration = Alteration(seed=3, drop_ratio=0.5)
        return UpcycledWeights(
            [RandomWeights(DENSE)], mixture(4), replica_map(96, 1, 4), alteration
        )

    forwards, backwards = make(), make()
    keys = list(tensor_shapes(forwards.model))
    first = {key: forwards.tensor(key) for key in keys}
    assert all(torch.equal(first[key], backwards.tensor(key)) for key in reversed(keys))
    fc1 = first[layer_key(0, EXPERTS_FC1)]
    assert not torch.equal(fc1[0], fc1[1])


def test_sources_must_be_one_architecture() -> None:
    names = ["a", "b"]
    check_sources([RandomWeights(DENSE), RandomWeights(small_model(init_method_std=0.1))], names)
    with pytest.raises(UserError, match="a and b are different models: vocab_size is 101 and 103"):
        check_sources([RandomWeights(DENSE), RandomWeights(small_model(vocab_size=103))], names)
    with pytest.raises(UserError, match="rotary_base is 10000.0 and 5000.0"):
        check_sources([RandomWeights(DENSE), RandomWeights(small_model(rotary_base=5000.0))], names)
    with pytest.raises(UserError, match="b has experts already"):
        check_sources([RandomWeights(DENSE), RandomWeights(small_model(num_experts=4))], names)
    with pytest.raises(UserError, match="num_experts=3 is not a multiple of the 2 sources"):
        sources = [Shifted(0.0), Shifted(1.0)]
        UpcycledWeights(sources, mixture(3), replica_map(96, 1, 3), Alteration())


XFT = mixture(
    3, moe_shared_expert_intermediate_size=96, moe_shared_expert_gate="xft", moe_score_scale=1.0
)


def test_merging_weighs_shared_and_routed_experts() -> None:
    experts = RandomWeights(XFT)
    coefficients = [[0.0, 1.0, 2.0], [0.5, 0.0, 0.0]]
    merged = MergedWeights(experts, 0.75, coefficients)
    assert merged.model == DENSE
    for row, layer in enumerate((0, 2)):
        share = torch.tensor(coefficients[row], dtype=torch.float64).softmax(0) * 0.25
        for ours, routed, shared in (
            (FC1, EXPERTS_FC1, SHARED_FC1),
            (FC2, EXPERTS_FC2, SHARED_FC2),
        ):
            parts = experts.tensor(layer_key(layer, routed)).double()
            always = experts.tensor(layer_key(layer, shared)).double()
            expected = 0.75 * always + (share[:, None, None] * parts).sum(0)
            found = merged.tensor(layer_key(layer, ours)).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    others = tensor_shapes(DENSE).keys() & tensor_shapes(XFT).keys()
    assert all(torch.equal(merged.tensor(key), experts.tensor(key)) for key in others)


def test_upcycling_and_merging_give_the_dense_model_back() -> None:
    dense = RandomWeights(DENSE)
    experts = UpcycledWeights([dense], XFT, replica_map(96, 1, 3), Alteration())
    merged = MergedWeights(experts, 0.75)
    assert merged.model == DENSE
    for key in tensor_shapes(DENSE):
        torch.testing.assert_close(merged.tensor(key), dense.tensor(key), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(UserError, match="dense already"):
        MergedWeights(RandomWeights(DENSE))
    with pytest.raises(UserError, match="experts of width 24 cannot be added up"):
        MergedWeights(RandomWeights(small_model(num_experts=4)))
    with pytest.raises(UserError, match="shared weight is for models with a shared expert"):
        MergedWeights(RandomWeights(mixture(4)), 0.75)
    with pytest.raises(UserError, match="shared weight is for models with a shared expert"):
        MergedWeights(RandomWeights(XFT))
    with pytest.raises(UserError, match="1 rows of coefficients for 2 MoE layers"):
        MergedWeights(RandomWeights(XFT), 0.75, [[0.0, 0.0, 0.0]])
