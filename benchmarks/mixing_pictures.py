"""Pictures of the mixing study, as SVG that is the same for the same results."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import Difference

from megatron_ext.files import written_whole

Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Run]]
COLOURS = ("#1f5fa8", "#c2571a", "#2e7d4f", "#7a4fa3", "#a38a1f", "#555555", "#b03060", "#30a0a0")
VERDICTS = {-1: "#2e7d4f", 0: "#777777", 1: "#b03030"}


def draw_differences(
    path: Path,
    strategies: Sequence[str],
    columns: Sequence[str | None],
    cells: Mapping[tuple[str, str | None], Difference | None],
    base: str = "uniform",
) -> None:
    """A panel for the mean (None) and each data set: differences with their intervals."""
    size = (1.9 * len(columns) + 1.6, 0.3 * len(strategies) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        limit = _limit([found for name in strategies if (found := cells[name, column])])
        for place, strategy in enumerate(strategies):
            if found := cells[strategy, column]:
                colour = VERDICTS[found.sign]
                if abs(found.mean) > limit:  # far away: an arrow at the edge, and its value
                    edge = math.copysign(limit, found.mean)
                    axes.plot([edge], [place], ">" if edge > 0 else "<", color=colour)
                    where = {"ha": "right" if edge > 0 else "left", "va": "center"}
                    axes.text(0.9 * edge, place, f"{found.mean:+.2f}", fontsize=7, **where)
                    continue
                axes.plot([found.mean], [place], "o", color=colour, markersize=4)
                if math.isfinite(found.low):
                    axes.plot([found.low, found.high], [place, place], color=colour)
        if math.isfinite(limit):
            axes.set_xlim(-1.1 * limit, 1.1 * limit)
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.locator_params(axis="x", nbins=4)
        _frame(axes, column or "mean")
    panels[0].set_yticks(range(len(strategies)), strategies)
    panels[0].invert_yaxis()
    label = f"held-out loss less that of {base}, 95 % interval; left is better"
    figure.supxlabel(label, size=8)
    save(figure, path)


def _limit(found: Sequence[Difference]) -> float:
    """How far a panel reaches: infinitely, but for strategies far away from all others."""
    ends = sorted(max(map(abs, (d.low, d.high))) for d in found if math.isfinite(d.low))
    return ends[-2] if len(ends) > 2 and ends[-1] > 3 * ends[-2] else math.inf


def draw_weights(path: Path, names: Sequence[str], runs: Runs) -> None:
    """Weights by step, a panel for each strategy that decides."""
    deciding = [name for name, seeds in runs.items() if any(r["decisions"] for r in seeds.values())]
    columns = min(4, max(1, len(deciding)))
    lines = max(1, -(-len(deciding) // columns))
    figure = Figure(figsize=(2.6 * columns, 2.0 * lines + 0.4), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(deciding) :]:
        axes.set_visible(False)
    for axes, strategy in zip(panels, deciding, strict=False):
        _curves(axes, names, runs[strategy].values(), "weights")
        axes.set_ylim(0, None)
        _frame(axes, strategy)
    _legend(figure, panels[0], len(names))
    save(figure, path)


def draw_decisions(path: Path, names: Sequence[str], runs: Runs) -> None:
    """What the two rules that read loads saw: distances and progress, and the loads themselves."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, strategy, kind, title in (
        (panels[0, 0], "router_load", "distance", "router_load: distance $\\Delta$"),
        (panels[0, 1], "load_progress", "distance", "load_progress: relative distance r"),
        (panels[0, 2], "load_progress", "progress", "load_progress: relative progress g"),
        (panels[1, 2], "load_progress", "confidence", "load_progress: confidence s"),
    ):
        _curves(axes, names, runs.get(strategy, {}).values(), kind)
        _frame(axes, title)
    seeds = runs.get("router_load", {})
    first = next((run for run in seeds.values() if run["decisions"]), None)
    for axes, place, when in ((panels[1, 0], 0, "first"), (panels[1, 1], -1, "last")):
        if first is not None:  # experts have no common order from seed to seed, so of one seed
            mesh = axes.pcolormesh(first["decisions"][place]["loads"], cmap="Blues", vmin=0)
            figure.colorbar(mesh, ax=axes).ax.tick_params(labelsize=7)
            axes.set_yticks([n + 0.5 for n in range(len(names))], names)
            axes.invert_yaxis()
        _frame(axes, f"router_load: {when} loads by expert, seed {first and first['seed']}")
    _legend(figure, panels[0, 0], len(names))
    save(figure, path)


def _curves(axes: Axes, names: Sequence[str], runs: Any, kind: str) -> None:
    """Mean over runs by step, shaded from the lowest to the highest."""
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        steps: dict[int, list[float]] = {}
        for run in runs:
            for decision in run["decisions"]:
                value = decision.get(kind, {}).get(name)
                if value is not None:
                    steps.setdefault(decision["step"], []).append(value)
        if steps:
            ends = ([pick(values) for values in steps.values()] for pick in (min, max))
            axes.fill_between(list(steps), *ends, color=colour, alpha=0.15, linewidth=0)
            means = [statistics.fmean(values) for values in steps.values()]
            axes.plot(list(steps), means, color=colour, linewidth=1.3, label=name)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place = "outside lower center"
        figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    fixed = {"svg.hashsalt": path.stem, "svg.fonttype": "none"}
    with matplotlib.rc_context(fixed), written_whole(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
