"""Other grids for a recipe: which fit, and which is fastest."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.planning.hardware import Machine
from megatron_ext.planning.plan import Plan, bytes_a_parameter, with_libraries
from megatron_ext.planning.rehearsal import RankCost, rehearse
from megatron_ext.validation import validate

SIZES = (1, 2, 4, 8)

LAYERS_OF_A_CHUNK = 4
"""Of interleaved pipelines; fewer make the bubble smaller and the messages more."""


def grids(run: RunConfig, world_size: int, machine: Machine) -> Iterator[RunConfig]:
    """The recipe on every grid worth a look, in the order in which one that fits makes others of
    its kind superfluous: tensor parallelism within a node, pipelines of up to 8 stages, plain or
    interleaved, experts over up to 64 ranks, with recomputation after without, 1 to 4 samples at a
    time.
    """
    for pipeline, tensor, expert in product(SIZES, SIZES, (*SIZES, 16, 32, 64)):
        if tensor > machine.assumed.gpus_per_node or expert > (run.model.num_experts or 1):
            continue
        chunks = run.model.num_layers // (pipeline * LAYERS_OF_A_CHUNK)
        for virtual in (None, chunks) if pipeline > 1 and chunks > 1 else (None,):
            for recompute, micro_batch_size in product((None, "full"), (1, 2, 4)):
                other = copy.deepcopy(run)
                other.parallel.pipeline_model_parallel_size = pipeline
                other.parallel.virtual_pipeline_model_parallel_size = virtual
                other.parallel.tensor_model_parallel_size = tensor
                other.parallel.expert_model_parallel_size = expert
                other.training.micro_batch_size = micro_batch_size
                other.training.recompute_granularity = recompute  # type: ignore[assignment]
                try:
                    validate(other, world_size)
                except UserError:
                    continue
                if least_bytes(other, world_size) < machine.usable:
                    yield other


def distance(run: RunConfig, other: RunConfig) -> float:
    """How much of a grid changes: doublings of each size, and recomputation for one."""

    def sizes(config: RunConfig) -> list[float]:
        parallel = config.parallel
        return [
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size or 1,
            parallel.expert_model_parallel_size,
            config.training.micro_batch_size,
        ]

    changed = sum(abs(math.log2(a / b)) for a, b in zip(sizes(run), sizes(other), strict=True))
    same = run.training.recompute_granularity == other.training.recompute_granularity
    return changed + (0 if same else 1)


def quick_plan(run: RunConfig, world_size: int, machine: Machine) -> Plan:
    """A plan from the first and the last stage only, of two shallow models, one and two layers to a
    chunk, from which the rest follows; of the model as it is where layers are not alike or few.
    """
    validate(run, world_size)
    model, parallel = run.model, run.parallel
    chunks = parallel.pipeline_model_parallel_size * (
        parallel.virtual_pipeline_model_parallel_size or 1
    )
    alike = len(model.moe_layers) in (0, model.num_layers)
    depth = model.num_layers // chunks
    run = with_libraries(run)
    costs = []
    for stage in sorted({0, parallel.pipeline_model_parallel_size - 1}):
        rank = (world_size, stage, True, machine.assumed.imbalance)
        if alike and depth > 2:
            one, two = (rehearse(_with_layers(run, n * chunks), *rank) for n in (1, 2))
            costs.append(_extrapolate(one, two, depth - 1))
        else:
            costs.append(rehearse(run, *rank))
    return Plan(run, world_size, machine, costs)


def _with_layers(run: RunConfig, layers: int) -> RunConfig:
    other = copy.deepcopy(run)
    other.model.num_layers = layers
    for name in ("moe_score_scale", "moe_layer_freq"):
        value = getattr(other.model, name)
        if isinstance(value, list):
            setattr(other.model, name, value[:layers])
    return other


def _extrapolate(one: RankCost, two: RankCost, times: int) -> RankCost:
    """one + times (two - one)."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RankCost):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if field.name in ("micro_batch", "step"):
            values[field.name] = a.plus(b.minus(a), times)
        elif field.name == "groups":
            values[field.name] = a | b
        elif field.name == "stage":
            values[field.name] = a
        else:
            values[field.name] = a + times * (b - a)
    return RankCost(**values)


def least_bytes(run: RunConfig, world_size: int) -> float:
    """Least that weights, gradients and sharded optimizer state of a rank can take."""
    from megatron_ext.checkpoint.tensors import count_parameters
    from megatron_ext.training.freeze import count_trained

    parallel = run.parallel
    split = parallel.pipeline_model_parallel_size * max(
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size * parallel.expert_tp,
    )
    weight, state = bytes_a_parameter(run.training.precision)
    weights = count_parameters(run.model)[0] * weight / split
    return weights + count_trained(run.model, run.training.freeze) * (
        4 / split + state / world_size
    )


def rank_grids(
    run: RunConfig,
    world_size: int,
    machine: Machine,
    progress: Callable[[list[RunConfig]], Iterable[RunConfig]] = iter,
) -> list[Plan]:
    """Grids that fit, the fastest first; with recomputation only what does not fit without.

    Args:
        progress: wraps the list of candidates (a progress bar).
    """
    found: list[Plan] = []
    fits: set[tuple[Any, ...]] = set()
    too_large: set[tuple[Any, ...]] = set()
    for other in progress(list(grids(run, world_size, machine))):
        grid = dataclasses.astuple(other.parallel)
        with_size = (grid, other.training.micro_batch_size)
        with_recompute = (grid, other.training.recompute_granularity)
        if with_size in fits or with_recompute in too_large:
            continue
        plan = quick_plan(other, world_size, machine)
        if plan.fits:
            fits.add(with_size)
            found.append(plan)
        else:
            too_large.add(with_recompute)
    return sorted(found, key=lambda plan: plan.times().step)


def nearest_fit(run: RunConfig, world_size: int, machine: Machine, tries: int = 24) -> Plan | None:
    """The grid that fits and differs least from the recipe's; None where none of the nearest
    does.
    """
    candidates = sorted(grids(run, world_size, machine), key=lambda other: distance(run, other))
    for other in candidates[:tries]:
        plan = quick_plan(other, world_size, machine)
        if plan.fits:
            return plan
    return None
