"""From rehearsed pipeline stages to what a run costs: bytes, seconds, tokens per day."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.tensors import count_parameters
from megatron_ext.config import RunConfig
from megatron_ext.planning.hardware import Machine, on_wire
from megatron_ext.planning.observer import Call, Work
from megatron_ext.planning.rehearsal import RankCost, num_micro_batches, rehearse
from megatron_ext.training.flops import flops_per_token
from megatron_ext.training.freeze import count_trained
from megatron_ext.validation import data_parallel_size, validate

GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tensor x context",
    "CONTEXT_PARALLEL_GROUP": "context",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert x expert tensor",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
    "EMBEDDING_GROUP": "embedding",
    "MODEL_PARALLEL_GROUP": "model",
    "default_pg": "all ranks",
}
"""Names of megatron-core's groups in tables."""

OVERLAPPED = ("data", "expert data")
"""Groups whose messages can travel while a micro-batch is computed."""


def bytes_a_parameter(precision: str) -> tuple[int, int]:
    """Of a weight; and of a trained one's optimizer state: both moments, beside 16 bits its fp32
    copy.
    """
    return (4, 8) if precision == "fp32" else (2, 12)


@dataclass(frozen=True)
class Traffic:
    """What a rank of the dearest stage sends in a step."""

    collective: str
    group: str
    ranks: int
    between_nodes: bool
    messages: float
    payload: float
    """Bytes as the call names them."""
    wire: float
    """Bytes that leave the rank."""
    seconds: float


@dataclass(frozen=True)
class Times:
    """Parts of a step, in seconds; messages only as far as nothing is computed meanwhile."""

    compute: float
    tensor_and_expert: float
    """Messages within micro-batches but for the pipeline's."""
    pipeline: float
    """Messages between stages."""
    bubble: float
    """Waiting for the first micro-batch and after the last."""
    gradients: float
    """Reduction of gradients and gathering of weights."""
    optimizer: float

    @property
    def step(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass
class Plan:
    """What a recipe costs on a grid."""

    run: RunConfig
    world_size: int
    machine: Machine
    stages: list[RankCost]
    """Of the first, the second and the last stage; those between are like the second."""

    @property
    def dearest(self) -> RankCost:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def fits(self) -> bool:
        return self.dearest.peak <= self.machine.usable

    @property
    def micro_batches(self) -> int:
        return num_micro_batches(self.run, self.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.run.training.global_batch_size * self.run.data.seq_length

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens_per_step / self.times().step

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * 86400

    @property
    def parameters(self) -> tuple[int, int]:
        """Total and active."""
        return count_parameters(self.run.model)

    @property
    def model_flops(self) -> float:
        """FLOPs of a step without recomputation."""
        return flops_per_token(self.run.model, self.run.data.seq_length) * self.tokens_per_step

    def traffic(self, stage: RankCost) -> list[Traffic]:
        """Messages of a step, by collective and group, the longest first."""
        work = stage.work(self.micro_batches)
        rows: dict[tuple[str, str, int, bool], list[float]] = {}
        for (call, size), count in work.messages.items():
            ranks = self._ranks(stage, call)
            name = GROUPS.get(call.group, call.group.lower().replace("_", " "))
            if call.collective == "send":
                name = "pipeline"
            key = (call.collective, name, len(ranks), self.machine.crosses_nodes(ranks))
            row = rows.setdefault(key, [0.0] * 4)
            wire = on_wire(call.collective, len(ranks)) * size
            seconds = self.machine.message_seconds(call, size, ranks)
            for place, value in enumerate((1, size, wire, seconds)):
                row[place] += count * value
        found = [Traffic(*key, *row) for key, row in rows.items() if row[0] > 1e-6]
        return sorted(found, key=lambda row: -row.seconds)

    def _ranks(self, stage: RankCost, call: Call) -> list[int]:
        if call.peer is None:
            return stage.groups[call.group]
        pipeline = self.run.parallel.pipeline_model_parallel_size
        return sorted((stage.stage * (self.world_size // pipeline), call.peer))

    def times(self) -> Times:
        """Expected parts of a step, of the slowest stage in each."""
        parts = [self._stage_times(stage) for stage in self.stages]
        return Times(
            *(max(values) for values in zip(*map(dataclasses.astuple, parts), strict=True))
        )

    def _stage_times(self, stage: RankCost) -> Times:
        parallel, count = self.run.parallel, self.micro_batches
        compute = self.machine.kernel_seconds(stage.micro_batch)
        inner = self._message_seconds(stage, stage.micro_batch)
        sends = inner.pop("send", 0.0)
        others = sum(inner.values())
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        waits = (parallel.pipeline_model_parallel_size - 1) / chunks
        outer = self._message_seconds(stage, stage.step)
        gather = outer.pop("gather", 0.0)
        reduce = outer.pop("reduce", 0.0)
        # Hidden behind the backward pass of the last and the forward pass of the first micro-batch.
        if parallel.overlap_grad_reduce:
            reduce = max(0.0, reduce - compute * 2 / 3)
        if parallel.overlap_param_gather:
            gather = max(0.0, gather - compute / 3)
        return Times(
            compute=count * compute,
            tensor_and_expert=count * others,
            pipeline=count * sends,
            bubble=waits * (compute + others + sends),
            gradients=reduce + gather,
            optimizer=max(0.0, self.machine.kernel_seconds(stage.step)) + sum(outer.values()),
        )

    def _message_seconds(self, stage: RankCost, work: Work) -> dict[str, float]:
        """Seconds of messages by kind: send, gather and reduce (of data parallelism), other."""
        seconds: Counter[str] = Counter()
        for (call, size), count in work.messages.items():
            kind = "other"
            if call.collective == "send":
                kind = "send"
            elif GROUPS.get(call.group) in OVERLAPPED:
                kind = "gather" if call.collective == "all_gather" else "reduce"
            one = self.machine.message_seconds(call, size, self._ranks(stage, call))
            seconds[kind] += count * one  # type: ignore[assignment]
        return {kind: float(value) for kind, value in seconds.items()}

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all GPUs could do at their peak in the expected time."""
        peak = self.world_size * self.machine.gpu.peak
        return self.model_flops / (self.times().step * peak)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights; of those that are trained fp32 copies (16-bit training) and both moments."""
        weight, state = bytes_a_parameter(self.run.training.precision)
        trained = count_trained(self.run.model, self.run.training.freeze)
        return self.parameters[0] * weight + trained * state

    @property
    def checkpoint_seconds(self) -> float:
        """Optimizer state is gathered and written by one data-parallel replica."""
        parallel, assumed = self.run.parallel, self.machine.assumed
        model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        experts = parallel.expert_model_parallel_size * parallel.expert_tp
        writers = max(model, experts * parallel.pipeline_model_parallel_size)
        nodes = min(self.world_size, -(-writers // assumed.gpus_per_node) * assumed.gpus_per_node)
        nodes = max(1, nodes // assumed.gpus_per_node)
        return self.checkpoint_bytes / (nodes * assumed.write_gb_per_s * 1e9)

    def summary(self) -> dict[str, Any]:
        """All figures, as plain values."""
        times, parallel = self.times(), self.run.parallel
        total, active = self.parameters
        return {
            "gpu": self.machine.gpu.name,
            "world_size": self.world_size,
            "assumed": dataclasses.asdict(self.machine.assumed),
            "grid": dataclasses.asdict(parallel)
            | {"data_parallel_size": data_parallel_size(parallel, self.world_size)},
            "micro_batch_size": self.run.training.micro_batch_size,
            "micro_batches": self.micro_batches,
            "recompute_granularity": self.run.training.recompute_granularity,
            "parameters": total,
            "active_parameters": active,
            "fits": self.fits,
            "usable_bytes": self.machine.usable,
            "stages": [
                {
                    "stage": stage.stage,
                    "parameters": stage.parameters,
                    "weights": stage.weights,
                    "gradients": stage.gradients,
                    "optimizer": stage.optimizer,
                    "activations": stage.activations,
                    "communication_buffers": stage.buffers,
                    "peak": stage.peak,
                    "flops": stage.work(self.micro_batches).flops,
                    "traffic": [dataclasses.asdict(row) for row in self.traffic(stage)],
                }
                for stage in self.stages
            ],
            "model_flops": self.model_flops,
            "times": dataclasses.asdict(times),
            "step_seconds": times.step,
            "bubble_share": times.bubble / times.step,
            "mfu": self.mfu,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_day": self.tokens_per_day,
            "days": self.run.training.train_iters * times.step / 86400,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_seconds": self.checkpoint_seconds,
        }


def make_plan(run: RunConfig, world_size: int, machine: Machine) -> Plan:
    """Rehearse a recipe on a grid of GPUs.

    Raises:
        UserError: the grid does not work out.
    """
    validate(run, world_size)
    run = with_libraries(run)
    last = run.parallel.pipeline_model_parallel_size - 1
    stages = sorted({0, min(1, last), last})
    costs = [rehearse(run, world_size, stage, True, machine.assumed.imbalance) for stage in stages]
    return Plan(run, world_size, machine, costs)


def with_libraries(run: RunConfig) -> RunConfig:
    """The recipe with the defaults of a GPU with TransformerEngine or Apex made explicit.

    fp8 is planned as bf16: weights and most activations stay so.
    """
    run = copy.deepcopy(run)
    run.training.fp8 = "none"
    if run.parallel.use_distributed_optimizer is None:
        run.parallel.use_distributed_optimizer = True
    if run.training.precision == "auto":
        run.training.precision = "bf16"
    return run
