"""Sequences cut over ranks: attention against its formula, counts and checkpoints against one
process. (Losses over 20 steps: test_grids.py.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training.runs import losses, make_run, make_trainer, train_and_save, write_data

S, B, HEADS, GROUPS, WIDTH = 32, 2, 4, 2, 16

GRIDS: dict[str, tuple[int, dict[str, int]]] = {
    "CP2": (2, {"context_parallel_size": 2}),
    "CP2xTP2xEP4": (
        4,
        {
            "context_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 4,
        },
    ),
    "CP2xDP2xEP2": (4, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context")
    write_data(path)
    return path


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under a causal mask, written out."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).reshape(S, B, -1)


def attend(run: Any) -> None:
    """Outputs and gradients of this rank's positions."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.model.attention import SdpaAttention
    from megatron_ext.model.builder import transformer_config
    from megatron_ext.model.context import context_share
    from megatron_ext.training import grid as grids

    config = transformer_config(run, grids.initialize(run).platform)
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    attention = SdpaAttention(config, pg_collection=groups)
    torch.manual_seed(0)
    whole = [
        torch.randn(S, B, heads, WIDTH, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    upstream = torch.randn(S, B, HEADS * WIDTH, dtype=torch.float64)

    def share(tensor: Tensor) -> Tensor:
        return context_share(tensor.detach(), 0, groups.cp)

    expected = plain_attention(*whole)
    (expected * upstream).sum().backward()
    parts = [share(tensor).requires_grad_() for tensor in whole]
    found = attention(*parts, None)
    torch.testing.assert_close(found, share(expected))
    (found * share(upstream)).sum().backward()
    for part, tensor in zip(parts, whole, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(part.grad, share(tensor.grad))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_attention(ranks: int) -> None:
    run_ranks(ranks, attend, make_run(Path("unused"), {"context_parallel_size": ranks}))


def cut_and_gather(run: Any) -> None:
    """Our cut is megatron-core's (its rotary embedding cuts itself), and gathering undoes it."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    from megatron_ext.model.context import context_share, gather_context
    from megatron_ext.training import grid as grids

    grids.initialize(run)
    group = parallel_state.get_context_parallel_group()
    whole = torch.arange(S * 3.0).reshape(S, 3)
    share = context_share(whole, 0, group)
    assert torch.equal(share, get_pos_emb_on_this_cp_rank(whole, 0, group))
    assert torch.equal(share.T, context_share(whole.T, 1, group))
    assert torch.equal(gather_context(share, group), whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_cut_and_gather(ranks: int) -> None:
    run_ranks(ranks, cut_and_gather, make_run(Path("unused"), {"context_parallel_size": ranks}))


def first_step(run: Any) -> tuple[Any, Any, dict[str, float], dict[str, float]]:
    """The step's result, its loads [D, L, E] summed over ranks, the evaluation before and
    after.
    """
    trainer = make_trainer(run)
    before = trainer.evaluate()
    seen = []
    sum_over_grid = trainer.passes._sum

    def summed(*arguments: Any) -> Any:
        seen.append(sum_over_grid(*arguments))
        return seen[-1]

    trainer.passes._sum = summed
    result = trainer.train_step()
    [sums] = seen
    return result, sums.counts.numpy(), before, trainer.evaluate()


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_first_step_counts_each_token_once(grid: str, noise: bool, root: Path) -> None:
    world_size, parallel = GRIDS[grid]
    settings: dict[str, Any] = {
        "router": {"moe_gate_noise": noise, "moe_balance_loss": "cv2"},
        "training": {"micro_batch_size": 2},
    }
    [(reference, loads, before, after)] = run_ranks(1, first_step, make_run(root, **settings))
    assert loads.sum() == 4 * 32 * 4 * 2  # samples, tokens, layers, experts of a token
    for result in run_ranks(world_size, first_step, make_run(root, parallel, **settings)):
        step, counts, evaluated_before, evaluated_after = result
        assert np.array_equal(counts, loads)
        assert step.tokens == reference.tokens == 4 * 32
        assert (step.load_spread, step.dead_experts) == (
            reference.load_spread,
            reference.dead_experts,
        )
        assert step.domain_loss == pytest.approx(reference.domain_loss, rel=1e-5)
        assert step.aux_loss == pytest.approx(reference.aux_loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)
        assert evaluated_before == pytest.approx(before, rel=1e-5)
        assert evaluated_after == pytest.approx(after, rel=1e-4)


def test_checkpoint_moves_to_one_process_and_back(root: Path) -> None:
    world_size, parallel = GRIDS["CP2xTP2xEP4"]
    [expected] = run_ranks(1, losses, make_run(root), 4)
    context, one = str(root / "context"), str(root / "one")
    run = make_run(root, parallel, save=context)
    assert run_ranks(world_size, train_and_save, run, 2)[0] == pytest.approx(expected[:2], rel=1e-5)
    run = make_run(root, load=context, save=one)
    assert run_ranks(1, train_and_save, run, 1)[0] == pytest.approx(expected[2:3], rel=1e-5)
    run = make_run(root, parallel, load=one)
    assert run_ranks(world_size, losses, run, 1)[0] == pytest.approx(expected[3:], rel=1e-5)
