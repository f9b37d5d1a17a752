"""The router against formulas written from the papers, in float64 and without megatron-core."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training.runs import make_run

from megatron_ext.model.router import NOISE_EPSILON, cv_squared, noisy_load

S, B, H, E = 6, 2, 64, 8
T = S * B


# --- the papers' formulas ---------------------------------------------------------------------


def plain_cv_squared(values: Any) -> float:
    """Shazeer et al. 2017, eq. 7 and 11: variance over squared mean."""
    values = np.asarray(values, np.float64)
    mean = values.sum() / len(values)
    return float(((values - mean) ** 2).sum() / (len(values) - 1) / mean**2)


def plain_load(clean: Any, noisy: Any, sigma: Any, topk: int) -> Any:
    """Shazeer et al. 2017, eq. 8 and 9: kth_excluding is the k-th largest of the other experts."""
    load = np.zeros_like(clean)
    for token in range(clean.shape[0]):
        for expert in range(clean.shape[1]):
            others = sorted(np.delete(noisy[token], expert), reverse=True)
            distance = (clean[token, expert] - others[topk - 1]) / sigma[token, expert]
            load[token, expert] = 0.5 * (1 + math.erf(distance / math.sqrt(2)))
    return load


def plain_weights(logits: Tensor, topk: int) -> Tensor:
    """[T, E] -> weights [T, E] in float64: the k largest logits, then softmax over them."""
    chosen = logits.topk(topk, dim=-1).indices
    alone = torch.full_like(logits, -math.inf).scatter(1, chosen, logits.gather(1, chosen))
    return alone.softmax(-1)


def draw_logits(tokens: int, experts: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(0)
    clean = random.normal(size=(tokens, experts))
    sigma = random.uniform(0.3, 1.5, size=(tokens, experts))
    return clean, random.normal(size=(tokens, experts)), sigma


def test_cv_squared() -> None:
    values = torch.tensor([3.0, 1.0, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
    assert cv_squared(values).item() == pytest.approx(plain_cv_squared(values.detach()), rel=1e-9)
    assert cv_squared(torch.full((4,), 2.5)).item() == 0
    assert cv_squared(torch.tensor([4.0])).item() == 0
    assert torch.autograd.gradcheck(cv_squared, values)


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_noisy_load(topk: int) -> None:
    clean, noise, sigma = draw_logits(50, 6)
    noisy = clean + noise * sigma
    found = noisy_load(*map(torch.from_numpy, (clean, noisy, sigma)), topk)
    np.testing.assert_allclose(found.numpy(), plain_load(clean, noisy, sigma, topk), atol=1e-12)


def test_noisy_load_has_the_right_gradient() -> None:
    """Also through the thresholds, which are noisy logits of other experts."""
    clean, noise, sigma = (torch.from_numpy(x) for x in draw_logits(5, 6))
    assert torch.autograd.gradcheck(
        lambda c, s: noisy_load(c, c + noise * s, s, 2),
        (clean.requires_grad_(), sigma.requires_grad_()),
    )


def test_noisy_load_is_the_probability_and_the_reference_code_is_not() -> None:
    """Each expert's noise drawn again many times, the others' kept: how often is it chosen?"""
    clean, noise, sigma = draw_logits(12, 6)
    noisy, topk, draws = clean + noise * sigma, 2, 40_000
    random = np.random.default_rng(1)
    frequency = np.zeros_like(clean)
    for expert in range(clean.shape[1]):
        again = np.repeat(noisy[None], draws, axis=0)
        fresh = random.normal(size=(draws, len(clean)))
        again[:, :, expert] = clean[:, expert] + fresh * sigma[:, expert]
        best = np.argsort(-again, axis=-1)[..., :topk]
        frequency[:, expert] = (best == expert).any(-1).mean(0)
    found = noisy_load(*map(torch.from_numpy, (clean, noisy, sigma)), topk).numpy()
    five_sigma = 5 * 0.5 / math.sqrt(draws)
    assert np.abs(found - frequency).max() < five_sigma

    # LLaMA-MoE's code asks whether the noise term alone exceeds the (k+1)-th noisy logit.
    best = -np.sort(-noisy, axis=-1)
    wrong_side = noise * sigma > best[:, topk, None]
    threshold = np.where(wrong_side, best[:, topk, None], best[:, topk - 1, None])
    distance = (clean - threshold) / sigma
    reference = torch.special.ndtr(torch.from_numpy(distance)).numpy()
    assert np.abs(reference - frequency).max() > 20 * five_sigma


# --- a real router ----------------------------------------------------------------------------


def on_routers(body: Callable[[list[Any], Tensor], Any], **options: dict[str, Any]) -> Any:
    """`body(routers of a 4-layer model, hidden states [S, B, H])` in a process of its own."""
    return run_ranks(1, _with_routers, body, options)[0]


def _with_routers(body: Callable[[list[Any], Tensor], Any], options: dict[str, Any]) -> Any:
    from megatron_ext.model.builder import build_model, routers
    from megatron_ext.training import grid as grids

    run = make_run(Path("unused"), **options)
    model = build_model(run, grids.initialize(run).platform).train()
    torch.manual_seed(0)
    found = routers(model)
    for router in found:
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return body(found, torch.randn(S, B, H, requires_grad=True))


def plain_logits(router: Any, x: Tensor) -> Tensor:
    logits = x.double().reshape(T, H) @ router.weight.double().T
    if hasattr(router, "gate_out"):
        logits = logits.tanh() @ router.gate_out.double().T
    return logits


def plain_sigma(router: Any, x: Tensor) -> Tensor:
    raw = x.double().reshape(T, H) @ router.noise_weight.double().T
    return (1 + raw.exp()).log() + NOISE_EPSILON


@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize("topk", [2, 3, E])
def test_weights_are_topk_then_softmax_times_scale(gate: str, topk: int) -> None:
    def body(routers: list[Any], x: Tensor) -> None:
        for layer, router in enumerate(routers):
            weights, chosen = router(x)
            expected = plain_weights(plain_logits(router, x), topk)
            torch.testing.assert_close(weights.double(), (layer + 1) * expected, rtol=1e-4, atol=0)
            assert torch.equal(chosen, expected > 0)
            assert chosen.sum(1).eq(topk).all()

    scales = [1.0, 2.0, 3.0, 4.0]  # one for each layer
    model = {"moe_gate": gate, "moe_router_topk": topk, "moe_score_scale": scales}
    on_routers(body, model=model)


def test_one_expert_has_its_probability_among_all() -> None:
    """A softmax over one chosen logit is 1 and would teach the router nothing."""

    def body(routers: list[Any], x: Tensor) -> None:
        weights, _ = routers[0](x)
        probabilities = plain_logits(routers[0], x).softmax(-1)
        expected = probabilities * (probabilities == probabilities.amax(1, keepdim=True))
        torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=0)

    on_routers(body, model={"moe_router_topk": 1, "moe_score_scale": 1.0})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_cv2_loss_and_its_gradient(noise: bool, padded: bool) -> None:
    """Value in the log; gradient times the tokens that training divides by. Padding has no part."""

    def body(routers: list[Any], x: Tensor) -> None:
        router = routers[0]
        router.noise_seed = 7
        mask = torch.zeros(S, B, dtype=torch.bool)
        if padded:
            mask[4:, 1] = True
        weights, _ = router(x, padding_mask=mask if padded else None)
        (weights * 0).sum().backward()
        found = {name: p.grad.double().clone() for name, p in router.named_parameters()}

        router.zero_grad()
        clean = plain_logits(router, x)
        valid = (~mask).reshape(-1, 1).double()
        if noise:
            sigma = plain_sigma(router, x)
            drawn = router._noise(torch.zeros(S, B, E), router.noise_seed).double().reshape(T, E)
            noisy = clean + drawn * sigma
            load = (noisy_load(clean, noisy, sigma, 2) * valid).sum(0)
        else:
            noisy = clean
            load = ((plain_weights(noisy, 2) > 0) * valid).sum(0)
        importance = (plain_weights(noisy, 2) * valid).sum(0)
        loss = sum((v.var() / v.mean() ** 2 for v in (importance, load)), torch.zeros(()))
        assert router.aux_loss_sum.item() == pytest.approx(loss.item(), rel=1e-4)
        (0.05 * T * loss).backward()
        for name, parameter in router.named_parameters():
            expected = parameter.grad.double()
            assert expected.abs().max() > 0
            tolerance = 1e-3 * expected.abs().max().item()
            torch.testing.assert_close(found[name], expected, rtol=0, atol=tolerance)

    router = {"moe_gate_noise": noise, "moe_aux_loss_coeff": 0.05}
    on_routers(body, router=router, model={"moe_gate": "mlp"})


def test_padding_changes_no_loss_whatever_it_holds() -> None:
    def body(routers: list[Any], x: Tensor) -> None:
        mask = torch.zeros(S, B, dtype=torch.bool)
        mask[3:] = True
        values = []
        for filling in (0.0, 5.0):
            hidden = x.detach().clone()
            hidden[3:] += filling
            routers[0].aux_loss_sum = None
            routers[0](hidden, padding_mask=mask)
            values.append(routers[0].aux_loss_sum.item())
        routers[0].aux_loss_sum = None
        routers[0](hidden)
        assert values[0] == values[1] != routers[0].aux_loss_sum.item()

    on_routers(body)


def test_switch_loss_and_z_loss() -> None:
    """megatron-core's losses, scaled by us (Fedus et al. 2021, eq. 4; Zoph et al. 2022, eq. 5)."""

    def body(routers: list[Any], x: Tensor) -> None:
        router = routers[0]
        weights, chosen = router(x)
        (weights * 0).sum().backward()
        found = router.weight.grad.double().clone()
        router.zero_grad()
        logits = plain_logits(router, x)
        fraction = chosen.double().sum(0) / (2 * T)
        switch = E * (fraction * logits.softmax(-1).mean(0)).sum()
        assert router.aux_loss_sum.item() == pytest.approx(switch.item(), rel=1e-5)
        (T * (0.1 * switch + 0.01 * logits.logsumexp(-1).square().mean())).backward()
        scale = router.weight.grad.abs().max().item()
        torch.testing.assert_close(found, router.weight.grad.double(), rtol=0, atol=1e-4 * scale)

    settings = {"moe_balance_loss": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
    on_routers(body, router=settings)


def test_noise_is_keyed_by_micro_batch_and_layer_and_absent_in_evaluation() -> None:
    def body(routers: list[Any], x: Tensor) -> None:
        first, second = routers[:2]
        second.load_state_dict(first.state_dict())

        def weights(router: Any, key: int) -> Tensor:
            router.noise_seed = key
            return router(x)[0].detach()

        assert torch.equal(weights(first, 1), weights(first, 1))
        assert not torch.equal(weights(first, 1), weights(first, 2))
        assert not torch.equal(weights(first, 1), weights(second, 1))
        drawn = torch.stack([first._noise(torch.zeros(S, B, E), seed) for seed in range(400)])
        assert abs(drawn.mean().item()) < 0.02 and abs(drawn.std().item() - 1) < 0.02
        first.eval()
        expected = plain_weights(plain_logits(first, x), 2)
        torch.testing.assert_close(weights(first, 1).double(), expected, rtol=1e-4, atol=0)
        assert first.aux_loss_sum is not None  # of the training passes only
        before = first.aux_loss_sum.clone()
        weights(first, 1)
        assert torch.equal(first.aux_loss_sum, before)

    on_routers(body, router={"moe_gate_noise": True}, model={"moe_score_scale": 1.0})


def test_expert_bias_counts_no_padding() -> None:
    def body(routers: list[Any], x: Tensor) -> None:
        mask = torch.zeros(S, B, dtype=torch.bool)
        mask[0, 0] = mask[5, 1] = True
        _, chosen = routers[0](x, padding_mask=mask)
        expected = chosen[(~mask).reshape(-1)].sum(0)
        assert torch.equal(routers[0].local_tokens_per_expert.long(), expected)
        assert expected.sum() == 2 * (T - 2)

    on_routers(body, router={"moe_balance_loss": "none", "moe_router_enable_expert_bias": True})
