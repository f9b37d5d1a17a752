"""Loads against a naive loop over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training.runs import make_run

from megatron_ext.mixing.ledger import LoadLedger

D, L, E, S, B = 3, 4, 8, 5, 2


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Weights [S * B, E] with two experts a token, and which they are."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(S * B, E, generator=generator)
    chosen = torch.zeros(S * B, E, dtype=torch.bool)
    chosen.scatter_(1, probs.topk(2).indices, True)
    return probs * chosen, chosen


@pytest.mark.parametrize("padded", [False, True])
def test_counts_by_domain_layer_and_expert(padded: bool) -> None:
    ledger = LoadLedger(D, L, E, torch.device("cpu"))
    expected = torch.zeros(D, L, E, dtype=torch.int64)
    mass = torch.zeros(D, L, E, dtype=torch.float64)
    for micro, domains in enumerate([(0, 2), (1, 1), (2, 0)]):
        ledger.domains = torch.tensor(domains)
        mask = torch.zeros(S, B, dtype=torch.bool)
        if padded:
            mask[3:, 1] = mask[0, 0] = True
        for layer in (0, 2):
            probs, chosen = draw(10 * micro + layer)
            ledger.record(layer, probs, chosen, B, mask if padded else None)
            for token in range(S * B):
                position, sequence = divmod(token, B)
                if mask[position, sequence]:
                    continue
                for expert in range(E):
                    if chosen[token, expert]:
                        expected[domains[sequence], layer, expert] += 1
                        mass[domains[sequence], layer, expert] += probs[token, expert].double()
    tokens = 3 * (S * B - 3 * padded)
    assert expected.sum() == 2 * 2 * tokens
    found, found_mass = ledger.take()
    assert torch.equal(found, expected)
    torch.testing.assert_close(found_mass, mass)
    assert not ledger.take()[0].any()  # taken once


def test_nothing_is_counted_without_domains() -> None:
    """Evaluation."""
    ledger = LoadLedger(D, L, E, torch.device("cpu"))
    ledger.record(0, *draw(0), B)
    assert not ledger.take()[0].any()


def through_checkpointing() -> list[Any]:
    """Counts of a layer run plainly and under megatron-core's activation checkpointing."""
    from megatron.core import tensor_parallel

    from megatron_ext.model.builder import build_model, routers
    from megatron_ext.training import grid as grids

    run = make_run(Path("unused"))
    model = build_model(run, grids.initialize(run).platform).train()
    router = routers(model)[1]
    router.ledger = LoadLedger(D, L, E, torch.device("cpu"))
    router.ledger.domains = torch.tensor([0, 2])
    torch.manual_seed(0)
    x = torch.randn(S, B, 64, requires_grad=True)
    forward_passes = []

    def layer(hidden: Tensor) -> Tensor:
        forward_passes.append(torch.is_grad_enabled())
        weights, _ = router(hidden)
        return weights.square().sum()

    results = []
    for run_layer in (layer, lambda h: tensor_parallel.checkpoint(layer, False, h)):
        forward_passes.clear()
        run_layer(x).backward()
        results.append((router.ledger.take()[0].tolist(), list(forward_passes)))
    return results


def test_the_pass_that_recomputes_is_not_counted() -> None:
    [((plain, once), (recomputed, twice))] = run_ranks(1, through_checkpointing)
    assert once == [True] and twice == [False, True]
    assert recomputed == plain
    counts = torch.tensor(plain)
    assert counts.sum() == 2 * S * B and counts[:, 1].sum() == counts.sum()
    assert counts[0].sum() == counts[2].sum() == 2 * S and not counts[1].any()
