"""Answers to held-out conversations, to see what tuning does to the text.

Greedy, and without a cache: each token is a pass over whole rows, on the grid as it stands. Enough
for a few short samples at an evaluation; for more, export the checkpoint.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_ext.data.conversation_stream import ConversationStream
from megatron_ext.training.data import TrainingData
from megatron_ext.training.held_out import evaluating
from megatron_ext.training.passes import Passes, run_schedule


def answer_held_out(passes: Passes, data: TrainingData) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer (token ids) of the first held-out conversation of each data set.

    Collective; the prompt ends where the first trained stretch begins, and the answer at the token
    that ends it or after `logging.generate_tokens`.
    """
    names, prompts, ends = [], [], []
    for name, stream in data.valid.items():
        assert isinstance(stream, ConversationStream)
        row = stream.read(0)
        tokens, trained = row.tokens[0].tolist(), row.trained[0].astype(bool)
        names.append(name)
        prompts.append(tokens[: int(np.argmax(trained))])
        ends.append(tokens[-1])
    with evaluating(passes, len(data.names), count_loads=False):
        answers = _generate(passes, prompts, ends, passes.run.logging.generate_tokens)
    return {n: (p, a) for n, p, a in zip(names, prompts, answers, strict=True)}


def _generate(
    passes: Passes, prompts: list[list[int]], ends: list[int], limit: int
) -> list[list[int]]:
    size, length = passes.run.training.micro_batch_size, passes.run.data.seq_length
    rows = -(-len(prompts) // size) * size  # the schedule wants whole micro-batches
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    at = torch.ones(rows, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        at[row] = len(prompt)
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(limit):
        open_rows = [
            row
            for row, answer in enumerate(answers)
            if int(at[row]) < length and (not answer or answer[-1] != ends[row])
        ]
        if not open_rows:
            break
        chosen = _next_tokens(passes, tokens, at).tolist()
        for row in open_rows:
            answers[row].append(chosen[row])
            tokens[row, at[row]] = chosen[row]
            at[row] += 1
    return answers


def _next_tokens(passes: Passes, tokens: Tensor, at: Tensor) -> Tensor:
    """Likeliest token [rows] at position `at` [rows] of tokens [rows, S]; on every rank."""
    grid, training = passes.grid, passes.run.training
    size = training.micro_batch_size
    micro = list(zip(tokens.split(size), at.split(size), strict=True))
    forward = functools.partial(_forward, grid.platform.device)
    found = run_schedule(passes.run, passes.model, forward, micro, forward_only=True)
    chosen = torch.zeros(len(tokens), dtype=torch.int64, device=grid.platform.device)
    if grid.is_last_stage:
        chosen = torch.cat([entry["next"] for entry in found])
    if grid.pipeline_size > 1:
        torch.distributed.broadcast(
            chosen,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
    return chosen.cpu()


def _forward(device: torch.device, iterator: Any, model: Any, *unused: Any) -> tuple[Tensor, Any]:
    tokens, at = (tensor.to(device) for tensor in next(iterator))
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    output = model(tokens, positions, None)

    def choose(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """logits [b, S, vocabulary / TP]"""
        last = logits[torch.arange(len(at), device=device), at - 1]
        last = tensor_parallel.gather_from_tensor_model_parallel_region(last)
        zero = last.new_zeros(())
        return zero, zero.int() + 1, {"next": last.argmax(-1)}

    return output, choose
