"""Pictures of the mixing study, as SVG that is the same for the same results."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_pictures import frame, panels, save

Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Run]]
COLOURS = ("#1f5fa8", "#c2571a", "#2e7d4f", "#7a4fa3", "#a38a1f", "#555555", "#b03060", "#30a0a0")


def draw_weights(path: Path, names: Sequence[str], runs: Runs) -> None:
    """Weights by step, a panel for each strategy that decides."""
    deciding = [name for name, seeds in runs.items() if any(r["decisions"] for r in seeds.values())]
    figure, places = panels(len(deciding), 2.0)
    for axes, strategy in zip(places, deciding, strict=False):
        _curves(axes, names, runs[strategy].values(), "weights")
        axes.set_ylim(0, None)
        frame(axes, strategy)
    _legend(figure, places[0], len(names))
    save(figure, path)


def draw_decisions(path: Path, names: Sequence[str], runs: Runs) -> None:
    """What the two rules that read loads saw: distances and progress, and the loads themselves."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    places = figure.subplots(2, 3)
    for axes, strategy, kind, title in (
        (places[0, 0], "router_load", "distance", "router_load: distance $\\Delta$"),
        (places[0, 1], "load_progress", "distance", "load_progress: relative distance r"),
        (places[0, 2], "load_progress", "progress", "load_progress: relative progress g"),
        (places[1, 2], "load_progress", "confidence", "load_progress: confidence s"),
    ):
        _curves(axes, names, runs.get(strategy, {}).values(), kind)
        frame(axes, title)
    seeds = runs.get("router_load", {})
    first = next((run for run in seeds.values() if run["decisions"]), None)
    for axes, place, when in ((places[1, 0], 0, "first"), (places[1, 1], -1, "last")):
        if first is not None:  # experts have no common order from seed to seed, so of one seed
            mesh = axes.pcolormesh(first["decisions"][place]["loads"], cmap="Blues", vmin=0)
            figure.colorbar(mesh, ax=axes).ax.tick_params(labelsize=7)
            axes.set_yticks([n + 0.5 for n in range(len(names))], names)
            axes.invert_yaxis()
        frame(axes, f"router_load: {when} loads by expert, seed {first and first['seed']}")
    _legend(figure, places[0, 0], len(names))
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


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place = "outside lower center"
        figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=8)
