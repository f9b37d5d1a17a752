"""LoRA experts as weights, and as what a model computes with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.checkpoint import verify
from megatron_ext.checkpoint.experts import fingerprint
from megatron_ext.checkpoint.lora import FullExperts, LoraWeights, as_dense, full_experts, lost
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FC2,
    ROUTER,
    count_parameters,
    layer_key,
    lora_names,
    tensor_shapes,
)
from megatron_ext.checkpoint.upcycled import UpcycledWeights
from megatron_ext.config import ModelConfig
from megatron_ext.construction.upcycling import Alteration, replica_map
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import RandomWeights, save_checkpoint, small_model

DENSE = small_model()
TARGETS: list[Any] = ["gate", "up", "down"]


def lora_model(**options: Any) -> ModelConfig:
    values = {"num_experts": 4, "moe_ffn_hidden_size": 96, "moe_dense_last_layers": 1}
    return dataclasses.replace(DENSE, **{**values, "lora_rank": 6, "lora_alpha": 3.0, **options})


def weight(model: Any, layer: int, name: str) -> Tensor:
    tensor: Tensor = model.tensor(layer_key(layer, name))
    return tensor


def logits(weights: Any) -> Tensor:
    model = verify.fill(verify.build_model(weights.model), weights)
    return verify.logits(model, verify.prompt(weights.model))


@pytest.mark.parametrize("targets", [TARGETS, ["down"], ["up", "gate"]], ids=str)
def test_adapters_compute_what_full_experts_do(targets: list[Any]) -> None:
    lora = RandomWeights(lora_model(lora_targets=targets))
    full = FullExperts(lora)
    assert full.model == lora_model(lora_rank=None, lora_alpha=16.0)
    assert verify.relative_error(logits(lora), logits(full)) <= 1e-5

    fc1, fc2 = weight(full, 1, EXPERTS_FC1), weight(full, 1, EXPERTS_FC2)
    parts = {"gate": fc1[:, :96], "up": fc1[:, 96:], "down": fc2}
    gate, up = lora.gate_up(1)
    base = {"gate": gate, "up": up, "down": weight(lora, 1, FC2)}
    names = lora_names(TARGETS)
    for target, found in parts.items():
        expected = base[target].double().expand_as(found)
        if target in targets:
            a, b = (weight(lora, 1, name).double() for name in names[target])  # type: ignore[index]
            expected = expected + 0.5 * b @ a
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_one_hot_routing_gives_the_dense_model_of_an_expert() -> None:
    lora = RandomWeights(lora_model(moe_router_topk=1, moe_dense_last_layers=0))
    full = FullExperts(lora)

    class Dense(RandomWeights):
        """Expert 2 everywhere."""

        def tensor(self, key: str) -> Tensor:
            number, _, name = key.removeprefix("decoder.layers.").partition(".")
            experts = {FC1: EXPERTS_FC1, FC2: EXPERTS_FC2}
            if name not in experts:
                return lora.tensor(key)
            return weight(full, int(number), experts[name])[2]

    def to_expert_2(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> Any:
        probs = torch.zeros_like(output[0])
        probs[:, 2] = 1.0
        return probs, probs.bool()

    model = verify.fill(verify.build_model(lora.model), lora)
    for module in model.modules():
        if type(module).__name__ == "LlamaMoeRouter":
            module.register_forward_hook(to_expert_2)
    found = verify.logits(model, verify.prompt(DENSE))
    assert verify.relative_error(found, logits(Dense(DENSE))) <= 1e-5


def mixture(sources: list[Any], experts: int, **options: Any) -> UpcycledWeights:
    model = dataclasses.replace(DENSE, num_experts=experts, moe_ffn_hidden_size=96, **options)
    neurons = replica_map(96, 1, experts)
    return UpcycledWeights(sources, model, neurons, Alteration(seed=3), base=sources[0])


class Tuned(RandomWeights):
    """The random model, its FFNs changed by random matrices of some rank."""

    def __init__(self, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(DENSE, dtype)
        self.rank = rank

    def tensor(self, key: str) -> Tensor:
        start = super().tensor(key)
        if not key.endswith((FC1, FC2)):
            return start
        halves = start.float().chunk(2) if key.endswith(FC1) else (start.float(),)
        generator = torch.Generator().manual_seed(len(key) + self.rank)
        changed = []
        for half in halves:
            left, right = (torch.randn(n, self.rank, generator=generator) for n in half.shape)
            changed.append(half + 0.02 * left @ right.T)
        return torch.cat(changed).to(self.dtype)


def test_differences_of_the_rank_are_kept(tmp_path: Path) -> None:
    base = RandomWeights(DENSE)
    full = mixture([Tuned(2), Tuned(5), Tuned(9)], 3, moe_dense_first_layers=1)
    lora = LoraWeights(base, full, 5, 2.5, TARGETS, seed=1)
    shares = lost(lora, full, base)
    assert shares.shape == (2, 3) and shares[:, :2].max() < 1e-5 and shares[:, 2].min() > 0.2
    found = FullExperts(lora)
    for name in (EXPERTS_FC1, EXPERTS_FC2):
        kept = weight(found, 2, name)[:2]
        torch.testing.assert_close(kept, weight(full, 2, name)[:2], rtol=0, atol=1e-6)
    # All but the experts is the mixture's, and a shared FFN is the base's.
    assert torch.equal(weight(lora, 0, FC1), weight(full, 0, FC1))
    assert not torch.equal(weight(lora, 1, FC1), weight(Tuned(2), 1, FC1))
    assert torch.equal(weight(lora, 1, FC1), weight(base, 1, FC1))
    assert torch.equal(weight(lora, 1, ROUTER), weight(full, 1, ROUTER))
    # A tensor does not depend on when it is asked for.
    keys = list(tensor_shapes(lora.model))
    first = {key: lora.tensor(key) for key in keys}
    assert all(torch.equal(lora.tensor(key), first[key]) for key in reversed(keys))


def test_matrices_without_adapters_are_lost() -> None:
    base, full = RandomWeights(DENSE), mixture([Tuned(2)], 2)
    down = LoraWeights(base, full, 4, 4.0, ["down"], seed=1)
    deltas = [weight(full, 0, EXPERTS_FC1) - weight(base, 0, FC1)]
    deltas.append(weight(full, 0, EXPERTS_FC2) - weight(base, 0, FC2))
    first, second = (delta[0].norm() for delta in deltas)
    share = float(first / (first**2 + second**2).sqrt())
    assert lost(down, full, base)[0].tolist() == pytest.approx([share] * 2, rel=1e-4)


@pytest.mark.parametrize(("experts", "topk"), [(4, 2), (1, 1)])
def test_copies_start_as_the_dense_model(experts: int, topk: int) -> None:
    """One expert is a dense model that is tuned by LoRA."""
    dense = RandomWeights(DENSE)
    full = mixture([dense], experts, moe_router_topk=topk)
    lora = LoraWeights(dense, full, 8, 16.0, TARGETS, seed=1)
    assert verify.relative_error(logits(lora), logits(dense)) <= 1e-5
    a = [weight(lora, 0, name) for name, _ in lora_names(TARGETS).values()]
    assert all(tensor.abs().min() > 0 for tensor in a)
    if experts > 1:
        assert not torch.equal(a[0][0], a[0][1])
        assert as_dense(lora) is lora
    else:
        view = as_dense(lora)
        assert view.model == DENSE and fingerprint(view) == fingerprint(dense)
        assert all(torch.equal(view.tensor(key), dense.tensor(key)) for key in tensor_shapes(DENSE))


def test_a_checkpoint_holds_the_shared_ffn_once(tmp_path: Path) -> None:
    model = lora_model()
    stored = CheckpointWeights(save_checkpoint(tmp_path / "moe", model))
    assert stored.model == model and full_experts(stored) is not stored
    assert EXPERTS_FC1 not in "".join(stored.stored)
    dense, _ = count_parameters(DENSE)
    router, adapters = 4 * 48, 3 * 6 * (48 + 96)
    total, active = count_parameters(model)
    assert total == dense + 2 * (router + 4 * adapters)
    assert active == dense + 2 * (router + 2 * adapters)
    tokens = verify.prompt(model)
    loaded = verify.load(verify.build_model(model), stored.folder)
    assert torch.equal(verify.logits(loaded, tokens), logits(RandomWeights(model)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 49}, "lora_rank=49 must lie between 1 and 48"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0"),
        ({"lora_targets": []}, "lora_targets"),
        ({"lora_targets": ["up", "up"]}, "different matrices"),
        ({"moe_ffn_hidden_size": 48}, "as wide as the FFN that they share, 96"),
        ({"num_experts": None}, "there are none"),
    ],
)
def test_impossible_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(lora_model(), **options).validate()
