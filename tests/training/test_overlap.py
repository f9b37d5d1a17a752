"""Overlapped communication of the sharded optimizer, which only GPU runs use by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from training.runs import make_run, make_trainer, write_data

from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import tensor_shapes
from megatron_ext.config import RunConfig


def train_sharded_and_save(run: RunConfig, steps: int) -> list[float]:
    """With optimizer state over data parallelism, as with TransformerEngine or Apex."""
    from megatron_ext.training import optimizer

    optimizer.uses_distributed_optimizer = lambda *unused: True
    # megatron-core's refuses parameters that are not called CUDA tensors.
    kind = torch.Tensor.type
    torch.Tensor.type = lambda self, *to: (
        kind(self, *to) if to else kind(self).replace("torch.", "torch.cuda.")
    )
    trainer = make_trainer(run)
    losses = [trainer.train_step().loss for _ in range(steps)]
    trainer.save()
    return losses


def test_a_checkpoint_holds_the_parameters_of_its_step(tmp_path: Path) -> None:
    """Overlapped, a rank gets what others have updated during the next forward pass: not yet when
    a checkpoint is written after a step.
    """
    write_data(tmp_path)
    saved = {}
    for overlaps in (False, True):
        grid = {"overlap_grad_reduce": overlaps, "overlap_param_gather": overlaps}
        directory = tmp_path / f"overlap {overlaps}"
        run = make_run(tmp_path, grid, save=str(directory))
        losses = run_ranks(2, train_sharded_and_save, run, 3)[0]
        weights = CheckpointWeights(directory)
        saved[overlaps] = losses, {key: weights.tensor(key) for key in tensor_shapes(weights.model)}
    assert saved[True][0] == pytest.approx(saved[False][0], abs=1e-6)
    for key, expected in saved[False][1].items():
        torch.testing.assert_close(saved[True][1][key], expected, rtol=0, atol=1e-6)
