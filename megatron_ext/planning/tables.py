"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.config import RunConfig
from megatron_ext.planning.plan import Plan
from megatron_ext.validation import data_parallel_size

NOTE = (
    "Weights, gradients, optimizer state, activations and messages are counted on the code that "
    "trains;\nspeeds are the data sheet's times the efficiencies that are assumed. "
    "Nothing was measured on a GPU."
)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def gigabytes(size: float) -> str:
    """Bytes in GB, with more places below 1."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"


def billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def grid_name(run: RunConfig) -> str:
    """The sizes of a grid that are not 1."""
    parallel = run.parallel
    sizes = (
        ("tensor", parallel.tensor_model_parallel_size),
        ("pipeline", parallel.pipeline_model_parallel_size),
        ("chunks", parallel.virtual_pipeline_model_parallel_size or 1),
        ("context", parallel.context_parallel_size),
        ("expert", parallel.expert_model_parallel_size),
        ("expert tensor", parallel.expert_tp),
    )
    named = ", ".join(f"{name} {size}" for name, size in sizes if size > 1) or "data only"
    full = run.training.recompute_granularity
    return named + (f", recompute {full}" if full else "")


def describe(plan: Plan) -> str:
    """All of a plan."""
    machine = plan.machine
    nodes = -(-plan.world_size // machine.assumed.gpus_per_node)
    parts = [
        f"{plan.world_size} x {machine.gpu.name}, {nodes} node{'s' if nodes > 1 else ''}: "
        f"{grid_name(plan.run)}, data {data_parallel_size(plan.run.parallel, plan.world_size)}; "
        f"{plan.micro_batches} micro-batches of {plan.run.training.micro_batch_size} x "
        f"{plan.run.data.seq_length} tokens",
        f"{billions(plan.parameters[0])} parameters, {billions(plan.parameters[1])} active; "
        f"{plan.model_flops:.3g} FLOPs a step",
        _memory(plan),
        _times(plan),
        _traffic(plan),
        NOTE,
    ]
    return "\n\n".join(parts)


def _memory(plan: Plan) -> str:
    rows = [("GB per rank", *(f"stage {stage.stage}" for stage in plan.stages))]
    for name, attribute in (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer state", "optimizer"),
        ("activations", "activations"),
        ("  of it in messages", "buffers"),
        ("peak", "peak"),
    ):
        rows.append((name, *(gigabytes(getattr(stage, attribute)) for stage in plan.stages)))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return (
        f"{table(rows)}\n{verdict}: {gigabytes(plan.dearest.peak)} of "
        f"{gigabytes(plan.machine.usable)} GB"
    )


def _times(plan: Plan) -> str:
    times, steps = plan.times(), plan.run.training.train_iters
    rows = [("a step", "s", "%")]
    for name, value in (
        ("compute", times.compute),
        ("tensor and expert messages", times.tensor_and_expert),
        ("pipeline messages", times.pipeline),
        ("pipeline bubble", times.bubble),
        ("gradients and weights", times.gradients),
        ("optimizer", times.optimizer),
        ("together", times.step),
    ):
        rows.append((name, f"{value:.3f}", f"{100 * value / times.step:.1f}"))
    return (
        f"{table(rows)}\nMFU {100 * plan.mfu:.0f} %, "
        f"{plan.tokens_per_second / plan.world_size:,.0f} tokens/s a GPU, "
        f"{plan.tokens_per_day / 1e9:.2f} B tokens a day, "
        f"{steps * times.step / 86400:.1f} days for {steps} steps\n"
        f"checkpoint {gigabytes(plan.checkpoint_bytes)} GB, {plan.checkpoint_seconds:,.0f} s"
    )


def _traffic(plan: Plan) -> str:
    stage = plan.stages[0]
    rows = [("a rank of stage 0 sends in a step", "group", "ranks", "link", "messages", "GB", "s")]
    for row in plan.traffic(stage):
        rows.append(
            (
                row.collective,
                row.group,
                str(row.ranks),
                "network" if row.between_nodes else "node",
                f"{row.messages:,.0f}",
                gigabytes(row.wire),
                f"{row.seconds:.3f}",
            )
        )
    return table(rows) if len(rows) > 1 else "a rank sends nothing"


def compare(plans: Sequence[Plan]) -> str:
    """Grids side by side, one to a row."""
    rows = [("grid", "samples", "GB", "step s", "MFU %", "bubble %", "B tokens/day")]
    for plan in plans:
        times = plan.times()
        rows.append(
            (
                grid_name(plan.run),
                str(plan.run.training.micro_batch_size),
                gigabytes(plan.dearest.peak),
                f"{times.step:.2f}",
                f"{100 * plan.mfu:.1f}",
                f"{100 * times.bubble / times.step:.1f}",
                f"{plan.tokens_per_day / 1e9:.2f}",
            )
        )
    return table(rows)
