"""XFT's routing: its formula, its layer on real grids, and copies that compute the dense FFN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training.runs import losses, make_run, train_and_save, write_data

from megatron_ext.errors import UserError
from megatron_ext.model.xft import xft_weights

TP, PP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
XFT: dict[str, Any] = {
    "moe_shared_expert_intermediate_size": 32,
    "moe_shared_expert_gate": "xft",
    "moe_score_scale": 1.0,
    "moe_router_topk": 3,
    "moe_dense_first_layers": 1,
}
ROUTER: dict[str, Any] = {
    "moe_balance_loss": "aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 1e-3,
    "moe_gate_noise": True,
}


def plain_xft(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """s = softmax(all logits); shared 1 - max s; softmax(top-k s) * max s for the chosen."""
    routed, shared = torch.zeros_like(logits), torch.zeros(len(logits), dtype=logits.dtype)
    for token, row in enumerate(logits):
        s = row.exp() / row.exp().sum()
        best = s.argsort(descending=True)[:topk]
        largest = s[best[0]]
        shared[token] = 1 - largest
        routed[token, best] = s[best].exp() / s[best].exp().sum() * largest
    return routed, shared


@pytest.mark.parametrize("topk", [1, 3, 7])
def test_weights_are_those_of_the_formula(topk: int) -> None:
    logits = torch.randn(40, 7, dtype=torch.float64) * 3
    chosen = torch.zeros(40, 7, dtype=torch.bool).scatter(1, logits.topk(topk).indices, True)
    routed, shared = xft_weights(logits, chosen)
    for found, expected in zip((routed, shared), plain_xft(logits, topk), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routed.sum(1) + shared, torch.ones(40, dtype=torch.float64))
    assert xft_weights(logits.bfloat16(), chosen)[0].dtype == torch.float32


def test_weights_teach_the_router() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.zeros(4, 5, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    assert torch.autograd.gradcheck(lambda x: xft_weights(x, chosen), logits)


# --- real layers --------------------------------------------------------------------------------


def test_a_layer_adds_up_its_experts() -> None:
    """y = (1 - max s) f_shared(x) + sum of the chosen, in float64; and copies give f(x)."""
    run = make_run(Path("unused"), model=XFT, router={"moe_balance_loss": "none"})
    run_ranks(1, _compare_layer, run)


def _compare_layer(run: Any) -> None:
    from megatron_ext.model.builder import build_model
    from megatron_ext.training import grid as grids

    model = build_model(run, grids.initialize(run).platform).train()
    layer = model.decoder.layers[1].mlp
    assert not hasattr(model.decoder.layers[0].mlp, "router")
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    x = torch.randn(6, 2, 64, requires_grad=True)
    found, _ = layer(x)
    tokens = x.double().reshape(12, 64)
    routed, shared = plain_xft(tokens @ layer.router.weight.double().T, 3)

    def ffn(fc1: Tensor, fc2: Tensor) -> Tensor:
        gate, up = (tokens @ fc1.double().T).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ fc2.double().T

    always = layer.shared_experts
    expected = shared[:, None] * ffn(always.linear_fc1.weight, always.linear_fc2.weight)
    for expert in range(8):
        output = ffn(layer.experts.linear_fc1[expert], layer.experts.linear_fc2[expert])
        expected = expected + routed[:, expert, None] * output
    torch.testing.assert_close(found.double().reshape(12, 64), expected, rtol=1e-4, atol=1e-4)
    assert layer.router.shared_weight is None

    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), (layer.router.weight, x))
    loss = (expected * weight.double().reshape(12, 64)).sum()
    plain = torch.autograd.grad(loss, (layer.router.weight, x))
    for a, b in zip(ours, plain, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2 all-gather": (2, {EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "TP2xEP2": (2, {TP: 2, EP: 2}),
    "TP2xPP2": (4, {TP: 2, PP: 2}),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[float]]:
    root = tmp_path_factory.mktemp("xft")
    write_data(root)
    saved = str(root / "start")
    run_ranks(1, train_and_save, make_run(root, model=XFT, router=ROUTER, save=saved), 1)
    again = make_run(root, model=XFT, router=ROUTER, load=saved)
    return root, saved, run_ranks(1, losses, again, 8)[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_losses_equal_one_process(grid: str, start: tuple[Path, str, list[float]]) -> None:
    root, saved, reference = start
    world_size, parallel = GRIDS[grid]
    run = make_run(root, parallel, model=XFT, router=ROUTER, load=saved)
    results = run_ranks(world_size, losses, run, 8)
    assert all(result == results[0] for result in results)
    assert reference[-1] < reference[0]
    assert results[0] == pytest.approx(reference, rel=1e-4)


def test_recomputation_changes_nothing(start: tuple[Path, str, list[float]]) -> None:
    root, saved, reference = start
    full = {"recompute_granularity": "full"}
    run = make_run(root, model=XFT, router=ROUTER, training=full, load=saved)
    assert run_ranks(1, losses, run, 8)[0] == pytest.approx(reference, rel=1e-6)


def test_balance_losses_reach_the_router() -> None:
    """They hang on megatron-core's weights, which XFT replaces."""
    run = make_run(Path("unused"), model=XFT, router={**ROUTER, "moe_gate_noise": False})
    off = make_run(Path("unused"), model=XFT, router={"moe_balance_loss": "none"})
    with_loss, without = (run_ranks(1, _router_gradient, each)[0] for each in (run, off))
    assert with_loss > 1e-3 and without == 0


def _router_gradient(run: Any) -> float:
    from megatron_ext.model.builder import build_model, routers
    from megatron_ext.training import grid as grids

    model = build_model(run, grids.initialize(run).platform).train()
    router = routers(model)[0]
    torch.manual_seed(0)
    weights, _ = router(torch.randn(6, 2, 64))
    (weights * 0).sum().backward()
    return float(router.weight.grad.abs().max())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="moe_shared_expert_gate=xft shares"):
        make_run(Path(), model={**XFT, "moe_score_scale": 2.0}).model.validate()
    with pytest.raises(UserError, match="moe_shared_expert_gate=xft shares"):
        options = {**XFT, "moe_shared_expert_intermediate_size": None}
        make_run(Path(), model=options).model.validate()


def test_moe_layers_by_frequency_and_list() -> None:
    def moe_layers(**options: Any) -> list[int]:
        model = make_run(Path(), model={"num_layers": 6, **options}).model
        model.validate()
        return model.moe_layers

    assert moe_layers() == [0, 1, 2, 3, 4, 5]
    assert moe_layers(moe_layer_freq=2) == [0, 2, 4]
    assert moe_layers(moe_layer_freq=2, moe_dense_first_layers=1) == [2, 4]
    assert moe_layers(moe_layer_freq=[0, 1, 1, 0, 0, 1], moe_dense_last_layers=1) == [1, 2]
    for wrong in (0, [1, 2, 0, 1, 1, 1]):
        with pytest.raises(UserError, match="neither a number from 1 on nor a list of 0, 1"):
            moe_layers(moe_layer_freq=wrong)
    with pytest.raises(UserError, match="moe_layer_freq has 2 values for 6 layers"):
        moe_layers(moe_layer_freq=[1, 0])
    with pytest.raises(UserError, match="leave no MoE layer"):
        moe_layers(moe_layer_freq=[0] * 6)
