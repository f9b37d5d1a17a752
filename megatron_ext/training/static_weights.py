"""What static weights can be made of before a run: how its data sets look to the model.

D data sets, L MoE layers, E experts, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.config import RunConfig
from megatron_ext.data.loader import validation_batches
from megatron_ext.errors import UserError
from megatron_ext.mixing.controller import choose_layers
from megatron_ext.training import held_out
from megatron_ext.training.data import TrainingData
from megatron_ext.training.passes import Passes
from megatron_ext.training.samples import SamplePool, check_sentence_model, sentence_embeddings

Floats = NDArray[np.float64]


def check(run: RunConfig, by: str, sentence_model: Path | None) -> None:
    """Refuse what cannot be measured, before any work.

    Raises:
        UserError: no routers, or a grid on which no rank sees whole hidden states.
    """
    if by == "gate_load" and not run.model.is_moe:
        raise UserError("gate loads are of a MoE, and the model is dense", "take --by embedding")
    parallel = run.parallel
    if by == "embedding" and sentence_model is not None:
        check_sentence_model(sentence_model)
    elif by == "embedding" and (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
        > 1
    ):
        raise UserError(
            "hidden states are read whole: without tensor, pipeline or context parallelism",
            "share the experts (expert_model_parallel_size), or name a --sentence-model",
        )


def gate_loads(passes: Passes, data: TrainingData) -> Floats:
    """Shares of experts [D, L, E] in the picks of held-out samples (collective)."""
    layers = choose_layers(passes.run.mixing.layers or "last", passes.run.model)
    counts = held_out.probe(passes, data).counts.sum(0)[:, list(layers)].astype(np.float64)
    shares: Floats = counts / counts.sum(-1, keepdims=True)
    return shares


def hidden_states(passes: Passes, data: TrainingData) -> Floats:
    """Mean last hidden state [D, h] of the tokens of held-out samples (collective)."""
    run, grid = passes.run, passes.grid
    sums = torch.zeros(len(data.names), run.model.hidden_size + 1, dtype=torch.float64)
    with held_out.evaluating(passes, len(data.names), count_loads=False):
        for place, name in enumerate(data.names):
            stream = data.valid[name]
            samples = min(run.data.eval_samples, stream.num_samples)
            batches = list(
                validation_batches(
                    stream,
                    samples,
                    run.training.micro_batch_size,
                    grid.data_rank,
                    grid.data_size,
                    domain=place,
                )
            )
            present = iter([_present(batch) for batch in batches])
            with _watching(passes.model[0], present, sums[place]):
                passes(batches, forward_only=True)
    sums = sums.to(grid.platform.device)
    if grid.world_size > 1:
        torch.distributed.all_reduce(sums)
    means: Floats = (sums[:, :-1] / sums[:, -1:]).cpu().numpy()
    return means


def sentences(run: RunConfig, data: TrainingData, sentence_model: Path) -> Floats:
    """Mean sentence embedding [D, width] of held-out samples."""
    assert run.checkpoint.load
    pool = SamplePool(data.valid, run.data.eval_samples, run.data.seq_length, 0, run.training.seed)
    tokenizer = Path(run.checkpoint.load) / layout.TOKENIZER_DIR
    embeddings = sentence_embeddings(pool, sentence_model, tokenizer).double().numpy()
    return np.stack([embeddings[pool.domains == place].mean(0) for place in range(len(data.valid))])


def _present(batch: dict[str, Tensor]) -> Tensor:
    """1 for each token of a micro-batch [S, b] that is no padding."""
    padding = batch.get("padding_mask")
    mask = batch["loss_mask"] if padding is None else ~padding
    return mask.t().double()


@contextmanager
def _watching(model: Any, present: Iterator[Tensor], total: Tensor) -> Iterator[None]:
    """Adds the hidden states of each micro-batch, and the number of its tokens, to `total`."""

    def add(module: Any, args: Any, output: Tensor) -> None:
        mask = next(present).to(output.device)  # [S, b] beside [S, b, h]
        total[:-1] += torch.einsum("sb,sbh->h", mask, output.double()).cpu()
        total[-1] += mask.sum().cpu()

    while hasattr(model, "module"):
        model = model.module
    handle = model.decoder.final_layernorm.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
