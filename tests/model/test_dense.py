"""Attention and norm of the local backend against explicit formulas."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training.runs import make_run

from megatron_ext.model.norm import RMSNorm

S, B, HEADS, GROUPS, D = 7, 2, 4, 2, 16


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head; `hidden` [b, s, s] is True where not to look."""
    out = torch.zeros(S, B, HEADS, D, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = q[:, b, head] @ k[:, b, group].T / math.sqrt(D)
            weights = scores.masked_fill(hidden[b], -math.inf).exp()
            out[:, b, head] = weights / weights.sum(1, keepdim=True) @ v[:, b, group]
    return out.reshape(S, B, HEADS * D)


def attend() -> None:
    from megatron_ext.model.builder import build_model
    from megatron_ext.training import grid as grids

    run = make_run(Path("unused"))
    model: Any = build_model(run, grids.initialize(run).platform)
    attention = model.decoder.layers[1].self_attention.core_attention
    torch.manual_seed(0)
    q = torch.randn(S, B, HEADS, D, dtype=torch.float64)
    k, v = torch.randn(2, S, B, GROUPS, D, dtype=torch.float64)
    causal = torch.ones(S, S, dtype=torch.bool).triu(1).expand(B, S, S)
    torch.testing.assert_close(attention(q, k, v, None), explicit_attention(q, k, v, causal))
    # Two documents in the second sequence, which do not see each other.
    documents = torch.tensor([[0] * S, [0] * 3 + [1] * (S - 3)])
    mask = causal | (documents[:, :, None] != documents[:, None, :])
    found = attention(q, k, v, mask[:, None])
    torch.testing.assert_close(found, explicit_attention(q, k, v, mask))
    assert not torch.allclose(found, attention(q, k, v, None))


def test_grouped_query_attention_and_masks() -> None:
    run_ranks(1, attend)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_rms_norm(sequence_parallel: bool) -> None:
    config = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=sequence_parallel)
    norm = RMSNorm(config, 9, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 2, 9, dtype=torch.float64)
    expected = x / (x.square().sum(-1, keepdim=True) / 9 + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm.weight.sequence_parallel is sequence_parallel  # type: ignore[attr-defined]
