"""A rank's training step without memory and without other ranks, on the code that trains.

The process group is torch's fake one (a rank of any grid), tensors have shapes and no data; model,
DDP, schedule, router and optimizer are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.planning.assumptions import Rehearsing, Routing, assumed_loads, replaced
from megatron_ext.planning.observer import Work
from megatron_ext.planning.world import fake_world, fuse_adam, without_data
from megatron_ext.validation import data_parallel_size


@dataclass
class RankCost:
    """What one rank keeps, sends and computes in a step."""

    stage: int
    parameters: int
    """Of this rank."""
    weights: int
    """Bytes of the weights that layers compute with."""
    gradients: int
    """Bytes of megatron-core's gradient buffers."""
    optimizer: int
    """Bytes of moments and of the weights' fp32 copies."""
    kept: int
    """Bytes between steps: the three above and what modules keep for themselves."""
    peak: int
    """Largest sum of live bytes in a step; what exceeds the three above are activations, their
    gradients and communication buffers.
    """
    buffers: int
    """Bytes of it that had been or were to be sent or received."""
    micro_batch: Work
    """What each micro-batch adds to a step."""
    step: Work
    """What a step does beside its micro-batches."""
    groups: dict[str, list[int]]
    """Ranks of the groups in `Work.messages`."""

    @property
    def activations(self) -> int:
        return self.peak - self.weights - self.gradients - self.optimizer

    def work(self, micro_batches: int) -> Work:
        """All of a step."""
        return self.step.plus(self.micro_batch, micro_batches)


def num_micro_batches(run: RunConfig, world_size: int) -> int:
    """Micro-batches of a rank in a step."""
    data = data_parallel_size(run.parallel, world_size)
    return run.training.global_batch_size // (run.training.micro_batch_size * data)


def rehearse(
    run: RunConfig, world_size: int, stage: int, gpu: bool, imbalance: float = 1.0
) -> RankCost:
    """Build and train the first rank of a pipeline stage for as many micro-batches as it takes to
    know what a step costs.

    Args:
        run: a recipe that `validation.validate` accepts.
        world_size: ranks of the grid.
        stage: pipeline stage.
        gpu: as on a GPU (bf16, sharded optimizer state, fused Adam), or as on a CPU.
        imbalance: load of this rank's experts over the mean.
    """
    pipeline = run.parallel.pipeline_model_parallel_size
    rank = stage * (world_size // pipeline)
    micro_batches = num_micro_batches(run, world_size)
    interleaved = run.parallel.virtual_pipeline_model_parallel_size is not None
    few = pipeline if interleaved else 1
    many = 2 * pipeline if interleaved else max(2, pipeline - stage + 1)
    routing = (
        Routing(run.model.num_experts, run.model.moe_router_topk, imbalance)
        if run.model.num_experts is not None
        else None
    )
    with (
        fake_world(run, world_size, rank, gpu) as grid,
        without_data(gpu),
        assumed_loads(routing, skips_identity=not gpu),
    ):
        observer = Rehearsing(routing)
        with replaced(Tensor, "device", property(observer.device_of)), observer:
            step = _Step(run, grid, gpu)
            step(few)  # makes the optimizer's state, and what else is made once

            def work_of(count: int) -> Work:
                before = Work().plus(observer.work, 1)
                observer.reset_peak()
                step(count)
                return observer.work.minus(before)

            kept = observer.live
            little = work_of(few)
            peak, buffers = observer.peak, observer.peak_buffers
            if micro_batches > few:
                added = min(many, micro_batches) - few
                much = work_of(few + added)
                peak, buffers = observer.peak, observer.peak_buffers
            else:
                added, much = few, work_of(2 * few)
            micro_batch = Work().plus(much.minus(little), 1 / added)
            return RankCost(
                stage=stage,
                parameters=sum(p.numel() for p in step.parameters()),
                **static_bytes(step.model, step.optimizer),
                kept=kept,
                peak=peak,
                buffers=buffers,
                micro_batch=micro_batch,
                step=little.plus(micro_batch, -few),
                groups=observer.groups,
            )


# --- the step -------------------------------------------------------------------------------------


class _Step:
    """The trainer's step, on fake micro-batches."""

    def __init__(self, run: RunConfig, grid: Any, gpu: bool) -> None:
        from megatron_ext.training.optimizer import build_optimizer, build_training_model
        from megatron_ext.training.passes import Passes

        self.run, self.grid = run, grid
        self.model = build_training_model(run, grid.platform)
        self.optimizer, self.scheduler = build_optimizer(run, grid.platform, self.model)
        if gpu:
            fuse_adam(self.optimizer)
        self.passes = Passes(run, grid, self.model, max(1, len(run.data.domains)))

    def __call__(self, micro_batches: int) -> None:
        batches = [self._micro_batch() for _ in range(micro_batches)]
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.passes(batches, forward_only=False)
        self.optimizer.step()

    def _micro_batch(self) -> dict[str, Tensor]:
        rows, length = self.run.training.micro_batch_size, self.run.data.seq_length
        batch = {"domain": torch.zeros(rows, dtype=torch.int64)}
        if self.grid.reads_tokens:
            for name in ("tokens", "labels", "position_ids"):
                batch[name] = torch.zeros(rows, length, dtype=torch.int64)
            batch["loss_mask"] = torch.ones(rows, length)
        return batch

    def parameters(self) -> Iterator[Tensor]:
        for chunk in self.model:
            yield from chunk.parameters()


def static_bytes(model: list[Any], optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that a rank holds between steps."""
    parameters = [p for chunk in model for p in chunk.parameters()]
    buffers = [
        buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    weights = _storages(parameters)
    gradients = _storages(buffer.grad_data for buffer in buffers)
    kept: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            kept += group["params"]
        for state in part.optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, Tensor)]
    state_bytes = {key: size for key, size in _storages(kept).items() if key not in weights}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state_bytes.values()),
    }


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}
