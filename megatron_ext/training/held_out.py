"""Passes over held-out samples in evaluation mode: losses, and the loads of a probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ext.data.loader import validation_batches
from megatron_ext.mixing.controller import FOLDS, Loads
from megatron_ext.training.data import TrainingData
from megatron_ext.training.passes import Passes
from megatron_ext.training.step import MicroBatch


def evaluate(passes: Passes, data: TrainingData) -> dict[str, float]:
    """Mean loss of each domain's held-out samples (collective)."""
    results = {}
    with evaluating(passes, len(data.names), count_loads=False):
        for name in data.valid:
            batches = _batches(passes, data, name, passes.run.data.eval_samples)
            loss = passes(batches, forward_only=True).loss
            results[name] = float(loss[0].sum() / loss[1].sum())
    return results


def probe(passes: Passes, data: TrainingData) -> Loads:
    """Router loads of fixed held-out samples of every domain (collective).

    Sample i is in fold i modulo F, on any grid: each fold of each domain has an id of its own, and
    rows that only fill up a micro-batch have the last id, which is dropped.
    """
    domains, training = len(data.names), passes.run.training
    fill = domains * FOLDS
    with evaluating(passes, fill + 1, count_loads=True):
        batches = []
        for domain, name in enumerate(data.names):
            samples = min(passes.run.mixing.probe_samples, data.valid[name].num_samples)
            for number, batch in enumerate(_batches(passes, data, name, samples)):
                place = number * passes.grid.data_size + passes.grid.data_rank
                sample = place * training.micro_batch_size + torch.arange(training.micro_batch_size)
                ids = domain * FOLDS + sample % FOLDS
                batches.append({**batch, "domain": torch.where(sample < samples, ids, fill)})
        sums = passes(batches, forward_only=True)
    assert sums.counts is not None and sums.mass is not None
    counts, mass = (
        part[:fill].unflatten(0, (domains, FOLDS)).transpose(0, 1).numpy()
        for part in (sums.counts, sums.mass)
    )
    return Loads(counts, mass)


def _batches(passes: Passes, data: TrainingData, name: str, samples: int) -> list[MicroBatch]:
    stream = data.valid[name]
    return list(
        validation_batches(
            stream,
            min(samples, stream.num_samples),
            passes.run.training.micro_batch_size,
            passes.grid.data_rank,
            passes.grid.data_size,
            domain=data.names.index(name),
        )
    )


@contextmanager
def evaluating(passes: Passes, num_ids: int, count_loads: bool) -> Iterator[None]:
    """Evaluation mode, and ids and a ledger of its own; training's come back afterwards."""
    training_ids = passes.forward_step.num_domains
    for chunk in passes.model:
        chunk.eval()
    passes.use_ids(num_ids, count_loads)
    try:
        yield
    finally:
        passes.use_ids(training_ids)
        for chunk in passes.model:
            chunk.train()
