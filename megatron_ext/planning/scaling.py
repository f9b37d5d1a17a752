"""The text of docs/scaling.md: the recipes as they are, and two of them on 8 to 10,240 GPUs."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.planning.command import recipe_world_size
from megatron_ext.planning.hardware import GPUS, Assumed, Machine
from megatron_ext.planning.plan import Plan
from megatron_ext.planning.search import least_bytes, quick_plan
from megatron_ext.planning.tables import gigabytes, grid_name
from megatron_ext.recipe import parse_run

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"

SIZES = (8, 32, 128, 512, 2048, 10240)
"""GPUs."""

GRIDS = ((1, 1), (2, 1), (2, 2), (2, 4), (2, 8), (4, 8))
"""Tensor and pipeline parallelism that each size is tried with; experts are spread over 8 GPUs."""

LARGER_BATCH = 1.5
"""Growth of the global batch that a grid may need before the next one is tried."""

SCALED = ("llama2_7b_2of8_8xa100", "llama3_8b_upcycled_16nodes")

INTRODUCTION = """# Scaling

What the recipes are expected to cost on 8 to 10,240 GPUs. Written by

    python tools/plan.py --scaling docs/scaling.md

**No GPU time was measured.** Bytes, messages and FLOPs are counted while the code that trains runs
without data (`megatron_ext/planning`): tests compare them with real processes on CPU, where memory
agrees within 10 % (with tensor parallelism 15 %: gloo holds messages for a while) and messages
exactly. Seconds follow from data sheets and the efficiencies assumed below; expect other ones, and
give them as options of `tools/plan.py`.
"""


def scaling_document(assumed: Assumed) -> str:
    """The whole text."""
    parts = [INTRODUCTION, _assumptions(assumed), _recipes(assumed)]
    parts += [_scaled(name, assumed) for name in SCALED]
    return "\n".join(parts)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join((head, "|" + "---|" * len(rows[0]), *body)) + "\n"


def _assumptions(assumed: Assumed) -> str:
    rows = [("GPU", "TFLOP/s", "memory GB", "GB/s", "NVLink GB/s", "network GB/s", "matmul share")]
    rows += [
        (
            gpu.name,
            f"{gpu.peak / 1e12:.0f}",
            f"{gpu.memory / 1e9:.0f}",
            f"{gpu.memory_bandwidth / 1e9:.0f}",
            f"{gpu.nvlink / 1e9:.0f}",
            f"{gpu.network / 1e9:.0f}",
            f"{gpu.matmul}",
        )
        for gpu in GPUS.values()
    ]
    values = textwrap.fill(
        ", ".join(
            f"`{name}` {value}"
            for name, value in dataclasses.asdict(assumed).items()
            if value is not None
        ),
        width=100,
    )
    return f"""## What is assumed

{_markdown(rows)}
Dense bf16 peaks, each GPU's own bandwidth in one direction; the last column is the share of the
peak that matrix products are taken to reach. Besides:

{values}

- An operator takes as long as its products at that rate, or its bytes at the memory's, or a launch.
  The plain-torch layers are counted, in bf16; TransformerEngine fuses some of their operators.
- Messages within a micro-batch are not overlapped with anything. Gradients and gathered weights
  travel behind one micro-batch where the recipe asks for it. Nodes are joined without bottleneck.
- The busiest rank's experts get `imbalance` times the mean load, in memory and in time.
- Optimizer state is fp32 (weights, two moments), sharded over data parallelism.
"""


def _row(plan: Plan, first: str) -> tuple[str, ...]:
    times, stage = plan.times(), plan.dearest
    return (
        first,
        grid_name(plan.run),
        str(plan.micro_batches),
        f"{plan.tokens_per_step / 1e6:.1f}",
        gigabytes(stage.weights + stage.gradients + stage.optimizer),
        gigabytes(stage.activations),
        f"{times.step:.2f}",
        f"{100 * (times.tensor_and_expert + times.pipeline + times.gradients) / times.step:.0f}",
        f"{100 * times.bubble / times.step:.0f}",
        f"{100 * plan.mfu:.0f}",
        f"{plan.tokens_per_day / 1e9:.2f}",
    )


HEAD = (
    "grid",
    "micro-batches",
    "M tokens/step",
    "state GB",
    "activations GB",
    "step s",
    "messages %",
    "bubble %",
    "MFU %",
    "B tokens/day",
)


def _load(name: str) -> tuple[RunConfig, int]:
    arguments = ["--config", str(RECIPES / f"{name}.yaml")]
    return parse_run(arguments), recipe_world_size(arguments)


def _recipes(assumed: Assumed) -> str:
    rows: list[tuple[str, ...]] = [("recipe, GPUs", *HEAD)]
    for path in tqdm(sorted(RECIPES.glob("*.yaml")), desc="recipes"):
        if not path.read_text().startswith("# world_size"):
            continue
        run, world_size = _load(path.stem)
        gpu = GPUS["a100" if "a100" in path.stem else "h100"]
        plan = quick_plan(run, world_size, Machine(gpu, assumed))
        rows.append(_row(plan, f"`{path.stem}`, {world_size} {gpu.name}"))
    return f"## The recipes\n\nPer rank of the stage that needs most memory.\n\n{_markdown(rows)}"


def _scaled(name: str, assumed: Assumed) -> str:
    machine = Machine(GPUS["h100"], assumed)
    run, _ = _load(name)
    rows: list[tuple[str, ...]] = [("H100", *HEAD, "speed per GPU")]
    first: tuple[int, float] | None = None
    for world_size in tqdm(SIZES, desc=name):
        best = first_fit(run, world_size, machine)
        if best is None:
            rows.append((f"{world_size:,}", "does not fit", *("" for _ in HEAD)))
            continue
        rate = best.tokens_per_second
        first = first or (world_size, rate)
        ideal = rate / first[1] / (world_size / first[0])
        rows.append((*_row(best, f"{world_size:,}"), f"{100 * ideal:.0f} %"))
    sizes = ", ".join(f"{tensor} x {pipeline}" for tensor, pipeline in GRIDS)
    return f"""## `{name}` on more GPUs

The first of the grids tensor x pipeline {sizes} that fits
and needs no larger global batch than {LARGER_BATCH} times the recipe's; experts over 8 GPUs, one
sample at a time, no interleaving, recomputation where nothing fits without. The last column is the
speed for each GPU beside the first row's.

{_markdown(rows)}"""


def first_fit(run: RunConfig, world_size: int, machine: Machine) -> Plan | None:
    """The plan of the first of `GRIDS` that fits."""
    for recompute in (None, "full"):
        for tensor, pipeline in GRIDS:
            other = copy.deepcopy(run)
            parallel, training = other.parallel, other.training
            parallel.tensor_model_parallel_size = tensor
            parallel.pipeline_model_parallel_size = pipeline
            parallel.virtual_pipeline_model_parallel_size = None
            parallel.expert_model_parallel_size = 8
            parallel.overlap_grad_reduce = parallel.overlap_param_gather = pipeline == 1
            training.micro_batch_size = 1
            training.recompute_granularity = recompute  # type: ignore[assignment]
            replicas = max(1, world_size // (tensor * pipeline))
            training.global_batch_size = -(-run.training.global_batch_size // replicas) * replicas
            if training.global_batch_size > LARGER_BATCH * run.training.global_batch_size:
                continue
            if least_bytes(other, world_size) > machine.usable:
                continue
            try:
                plan = quick_plan(other, world_size, machine)
            except UserError:
                continue
            if plan.fits:
                return plan
    return None
