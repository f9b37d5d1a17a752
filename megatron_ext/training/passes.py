"""Passes over micro-batches on this rank's part of the grid, and their sums over the whole grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.mixing.ledger import LoadLedger
from megatron_ext.model.builder import routers
from megatron_ext.training.grid import Grid
from megatron_ext.training.step import ForwardStep, MicroBatch


@dataclass
class Sums:
    """Sums of a pass over the grid, the same on every rank. D ids of samples, L layers, E
    experts.
    """

    loss: Tensor
    """Summed loss (nats) and trained tokens [2, D], float64."""
    aux_loss: float
    """Balance loss, mean over MoE layers and micro-batches, before its coefficient."""
    counts: Tensor | None
    """Picks (token, expert) [D, L, E], int64; none for a dense model."""
    mass: Tensor | None
    """Summed routing weights of these picks [D, L, E], float64."""

    def loss_by_name(self, names: Sequence[str]) -> dict[str, float]:
        """Mean loss of each data set that had tokens."""
        return {
            name: float(loss / tokens)
            for name, loss, tokens in zip(names, self.loss[0], self.loss[1], strict=True)
            if tokens > 0
        }


def run_schedule(
    run: RunConfig,
    model: list[Any],
    forward_step: Callable[..., Any],
    batches: Sequence[Any],
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Micro-batches through megatron-core's pipeline schedule (collective).

    Args:
        run: the recipe.
        model: this rank's chunks; each is given all batches.
        forward_step: megatron-core's forward_step_func.
        batches: what its iterator yields.
        forward_only: no gradients.

    Returns:
        What the loss function found in each micro-batch; empty but for the last stage.
    """
    iterators = [cycle(batches) for _ in model]
    with torch.set_grad_enabled(not forward_only):
        found: list[dict[str, Any]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(batches),
            seq_length=run.data.seq_length,
            micro_batch_size=run.training.micro_batch_size,
            decoder_seq_length=run.data.seq_length,
            forward_only=forward_only,
        )
    return found


class Passes:
    """Runs micro-batches through megatron-core's pipeline schedule.

    Args:
        run: the recipe.
        grid: from `grid.initialize`.
        model: this rank's chunks.
        num_ids: ids that a sample can have; training has one for each data set.
    """

    def __init__(self, run: RunConfig, grid: Grid, model: list[Any], num_ids: int) -> None:
        self.run, self.grid, self.model = run, grid, model
        self.routers = [router for chunk in model for router in routers(chunk)]
        self.forward_step = ForwardStep(
            None, num_ids, grid.platform.device, run.training.seed, self.routers
        )
        self.use_ids(num_ids)

    def use_ids(self, num_ids: int, count_loads: bool = True) -> None:
        """From now on samples have ids below `num_ids`, and routers count into a new ledger."""
        model = self.run.model
        self.ledger: LoadLedger | None = None
        if model.is_moe and count_loads:
            assert model.num_experts is not None
            self.ledger = LoadLedger(
                num_ids, model.num_layers, model.num_experts, self.grid.platform.device
            )
        for router in self.routers:
            router.ledger = self.ledger
        self.forward_step.ledger, self.forward_step.num_domains = self.ledger, num_ids

    def __call__(self, batches: list[MicroBatch], forward_only: bool) -> Sums:
        """All micro-batches of this rank, forwards and backwards (collective)."""
        ranks, rank = self.grid.data_size, self.grid.data_rank
        numbered = [(number * ranks + rank, batch) for number, batch in enumerate(batches)]
        losses = run_schedule(self.run, self.model, self.forward_step, numbered, forward_only)
        return self._sum(losses, len(batches))

    def _sum(self, losses: list[dict[str, Any]], micro_batches: int) -> Sums:
        """One all-reduce. Counts travel as float64, which holds them exactly: their sum does not
        depend on the order of the ranks. Nothing waits for the device before the end.
        """
        ids, model = self.forward_step.num_domains, self.run.model
        device = self.grid.platform.device
        parts = [torch.zeros(2 * ids + model.num_layers, dtype=torch.float64, device=device)]
        if self.grid.is_last_stage and self.grid.tensor_rank == 0:
            for micro in losses:
                parts[0][: 2 * ids] += micro["domains"].reshape(-1)
        for router in self.routers:
            if router.aux_loss_sum is not None:
                if self.grid.counts_data:
                    parts[0][2 * ids + router.layer_number - 1] = router.aux_loss_sum.double()
                router.aux_loss_sum = None
        if self.ledger is not None:
            counts, mass = self.ledger.take()
            parts += [counts.double().reshape(-1), mass.reshape(-1)]
        flat = torch.cat(parts)
        if self.grid.world_size > 1:
            torch.distributed.all_reduce(flat)
        flat = flat.cpu()
        aux = flat[2 * ids : 2 * ids + model.num_layers] / (micro_batches * self.grid.data_size)
        sums = Sums(
            loss=flat[: 2 * ids].view(2, ids),
            aux_loss=float(aux.sum()) / max(len(model.moe_layers), 1),
            counts=None,
            mass=None,
        )
        if self.ledger is not None:
            counts, mass = flat[2 * ids + model.num_layers :].view(2, *self.ledger.counts.shape)
            sums.counts, sums.mass = counts.long(), mass
        return sums
