"""What the demo ends with: a table of perplexities, a picture of the losses, the credits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Perplexities(NamedTuple):
    """Held-out perplexity of a domain at three points."""

    domain: str
    dense: float
    partitioned: float
    trained: float


def perplexities(
    dense: Mapping[str, float], partitioned: Mapping[str, float], rows: Sequence[Row]
) -> list[Perplexities]:
    """One entry per domain.

    Args:
        dense, partitioned: held-out loss (nats) by domain, as tools/evaluate.py writes it.
        rows: of the run's metrics.jsonl; the last evaluation is the state after the training.
    """
    last = [row for row in rows if row["kind"] == "valid"][-1]
    return [
        Perplexities(
            name, *(math.exp(loss) for loss in (dense[name], before, last[f"loss/{name}"]))
        )
        for name, before in partitioned.items()
    ]


def mean(entries: Sequence[Perplexities]) -> Perplexities:
    """The arithmetic mean over domains."""
    columns = zip(*(entry[1:] for entry in entries), strict=True)
    return Perplexities("mean", *(sum(column) / len(entries) for column in columns))


def shortcomings(entries: Sequence[Perplexities], times: float = 5.0) -> list[str]:
    """What the training did not achieve: empty where perplexity fell everywhere, and on the mean
    to at most 1 / `times`.
    """
    missed = [
        f"perplexity on {entry.domain} did not fall: {entry.partitioned:.2f} -> {entry.trained:.2f}"
        for entry in entries
        if not entry.trained < entry.partitioned
    ]
    overall = mean(entries)
    if not overall.trained * times <= overall.partitioned:
        missed.append(
            f"mean perplexity fell {overall.partitioned / overall.trained:.1f} times, "
            f"less than {times:g} times"
        )
    return missed


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is set left, numbers right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def cell(text: str, column: int) -> str:
        is_number = column > 0 and text[:1].isdigit()
        is_head_of_numbers = text == head[column] and rows and rows[0][column][:1].isdigit()
        right = is_number or (column > 0 and is_head_of_numbers)
        return text.rjust(widths[column]) if right else text.ljust(widths[column])

    shown = ["  ".join(cell(t, c) for c, t in enumerate(line)).rstrip() for line in lines]
    return "\n".join([shown[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *shown[1:]])


def figure(value: float) -> str:
    """A number as exact as is worth reading."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def perplexity_table(entries: Sequence[Perplexities]) -> str:
    """The table that the demo is about."""
    head = ("held-out perplexity", "dense", "after partition", "after training", "times lower")
    return table(
        head,
        [
            (e.domain, *(figure(v) for v in e[1:]), figure(e.partitioned / e.trained))
            for e in (*entries, mean(entries))
        ],
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(
    path: Path,
    dense: Mapping[str, float],
    partitioned: Mapping[str, float],
    rows: Sequence[Row],
) -> None:
    """One panel per domain: loss of the training batches, held-out loss, the dense model's level.

    Args:
        path: PNG file to write.
        dense, partitioned, rows: as in `perplexities`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(partitioned)
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.6 * lines + 0.7), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "valid" and row["step"] > 0]
    for axis, name in zip(axes.flat, names, strict=False):
        key = f"loss/{name}"
        points = [(row["step"], row[key]) for row in trained if key in row]
        axis.plot(
            *zip(*points, strict=True), ".", color="#b9c4d0", markersize=3, label="training batches"
        )
        held_out = [(0, partitioned[name]), *((row["step"], row[key]) for row in evaluated)]
        axis.plot(*zip(*held_out, strict=True), "o-", color="#1f5fa8", markersize=4,
                  label="held-out")  # fmt: skip
        axis.axhline(dense[name], color="#c2571a", linestyle="--", linewidth=1, label="dense model")
        axis.annotate(
            f"{held_out[-1][1]:.2f}", held_out[-1], textcoords="offset points", xytext=(-2, 7),
            ha="right", color="#1f5fa8", fontsize=9,
        )  # fmt: skip
        axis.annotate(
            f"{dense[name]:.2f}", (held_out[-1][0], dense[name]), textcoords="offset points",
            xytext=(-2, -11), ha="right", color="#c2571a", fontsize=9,
        )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(bottom=0)  # of all panels
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    for number, axis in enumerate(axes.flat):
        below = number + columns
        if number < len(names) and below >= len(names):  # nothing under it
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    for row_axes in axes:
        row_axes[0].set_ylabel("loss, nats per token")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if len(names) % columns:
        figure.legend(handles, labels, loc="lower right", bbox_to_anchor=(0.98, 0.12),
                      frameon=False)  # fmt: skip
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Loss per domain: from the partition towards the dense model")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
