"""Pictures that studies have in common, as SVG that is the same for the same results."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import Difference
from study_report import Results

from megatron_ext.files import written_whole

VERDICTS = {-1: "#2e7d4f", 0: "#777777", 1: "#b03030"}


def draw_differences(path: Path, results: Results) -> None:
    """A panel for the mean and each data set: differences to the base with their intervals."""
    names, columns, cells = results.others, [None, *results.names], results.cells
    size = (1.9 * len(columns) + 1.6, 0.3 * len(names) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        limit = _limit([found for name in names if (found := cells[name, column])])
        for place, name in enumerate(names):
            if found := cells[name, column]:
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
        frame(axes, column or "mean")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    label = f"held-out loss less that of {results.base}, 95 % interval; left is better"
    figure.supxlabel(label, size=8)
    save(figure, path)


def _limit(found: Sequence[Difference]) -> float:
    """How far a panel reaches: infinitely, but for strategies far away from all others."""
    ends = sorted(max(map(abs, (d.low, d.high))) for d in found if math.isfinite(d.low))
    return ends[-2] if len(ends) > 2 and ends[-1] > 3 * ends[-2] else math.inf


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """As many panels as asked for, up to four in a row, of a height in inches."""
    columns = min(4, max(1, count))
    rows = max(1, -(-count // columns))
    size = (2.6 * columns, height * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found[count:]:
        axes.set_visible(False)
    return figure, found


def frame(axes: Axes, title: str) -> None:
    """Title and spines of a panel."""
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    fixed = {"svg.hashsalt": path.stem, "svg.fonttype": "none"}
    with matplotlib.rc_context(fixed), written_whole(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
