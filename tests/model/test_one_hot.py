"""A mixture whose tokens all go to one expert is that expert's own dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.tiny import convert, save_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_ext.checkpoint import verify
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.model.builder import routers
from megatron_ext.model.one_hot import GatedRouting, OneHotRouting, one_expert_a_token

EXPERTS = 3


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Models with FFNs of their own; all else is the last one's."""
    root = tmp_path_factory.mktemp("one_hot")
    models = [
        LlamaForCausalLM.from_pretrained(save_llama(root / f"hf{number}", seed=number))
        for number in range(EXPERTS)
    ]
    last = models[-1].state_dict()
    for number, model in enumerate(models):
        ffns = {key: value for key, value in model.state_dict().items() if ".mlp." in key}
        model.load_state_dict({**last, **ffns})
        model.save_pretrained(root / f"own{number}")
    return [LlamaForCausalLM.from_pretrained(root / f"own{number}") for number in range(EXPERTS)]


def mixture(dense: list[Any], folder: Path, topk: int) -> Any:
    """Upcycled by UpIT from the models, one more expert being merged."""
    sources = [option for m in dense for option in ("--source", m.name_or_path)]
    convert("upit", "--base", dense[0].name_or_path, *sources, "--num-experts", EXPERTS + 1,
            "--moe-router-topk", topk, "--output", folder, "--skip-verify")  # fmt: skip
    checkpoint = CheckpointWeights(folder)
    return verify.load(verify.build_model(checkpoint.model), checkpoint.folder)


def one_hot_logits(model: Any, tokens: Tensor, experts: Tensor) -> Tensor:
    """[b, s] tokens and experts -> [b, s, vocabulary]."""
    with one_expert_a_token(routers(model)):
        for router in routers(model):
            router.given = OneHotRouting(experts)
        return verify.logits(model, tokens)


@pytest.mark.parametrize("topk", [1, 2])
def test_one_expert_is_its_own_dense_model(dense: list[Any], tmp_path: Path, topk: int) -> None:
    model = mixture(dense, tmp_path / "moe", topk)
    config = routers(model)[0].config
    tokens = verify.prompt(CheckpointWeights(tmp_path / "moe").model, 40, EXPERTS)
    expected = [verify.hf_logits(own, tokens) for own in dense]
    natural = verify.logits(model, tokens)
    for expert in range(EXPERTS):
        found = one_hot_logits(model, tokens, torch.full_like(tokens, expert))
        assert verify.relative_error(found, expected[expert]) <= 1e-5
        assert verify.relative_error(found, expected[expert - 1]) > 1e-2
    # Each sequence its own expert, in one pass.
    found = one_hot_logits(model, tokens, torch.arange(EXPERTS)[:, None].expand_as(tokens))
    for expert in range(EXPERTS):
        assert verify.relative_error(found[expert], expected[expert][expert]) <= 1e-5
    # Afterwards the routers choose again.
    assert config.moe_router_topk == topk
    assert torch.equal(verify.logits(model, tokens), natural)


def test_a_gate_that_is_open_changes_nothing(dense: list[Any], tmp_path: Path) -> None:
    """Straight-through always is; a sigmoid opens where h . r is large."""
    model = mixture(dense, tmp_path / "moe", 2)
    tokens = verify.prompt(CheckpointWeights(tmp_path / "moe").model, 12)
    experts = torch.ones_like(tokens)
    expected = one_hot_logits(model, tokens, experts)
    vectors = {
        router.layer_number: router.weight.detach().clone().requires_grad_()
        for router in routers(model)
    }
    ones = torch.ones(EXPERTS + 1)
    for gate, error in (("straight_through", 1e-6), ("sigmoid", 0.05)):
        losses = torch.zeros((), dtype=torch.float64)
        with one_expert_a_token(routers(model)):
            for router in routers(model):
                router.given = GatedRouting(
                    experts,
                    counted=experts.bool(),
                    vectors=vectors,
                    weights=(ones, ones),
                    scale=1.0,
                    gate=gate,  # type: ignore[arg-type]
                    losses=losses,
                )
            found = verify.logits(model, tokens)
        difference = verify.relative_error(found, expected)
        assert difference <= error if gate == "straight_through" else difference > error
        # 3 layers, 24 tokens, 4 experts, each near log 2 where vectors are small
        assert float(losses) / (3 * tokens.numel() * (EXPERTS + 1)) == pytest.approx(0.7, abs=0.15)
