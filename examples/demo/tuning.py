"""What the demo's instruction tuning did: the data sets' weights, and their held-out losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from report import Row, table


class Tuned(NamedTuple):
    """One data set through the tuning."""

    name: str
    weights: list[float]
    """At the start, and after each decision."""
    before: float
    """Held-out loss (nats per trained token)."""
    after: float


def tuned_sets(rows: Sequence[Row]) -> tuple[list[int], list[Tuned]]:
    """The steps after which was decided, and one entry per data set.

    Args:
        rows: of the run's metrics.jsonl, which begins with an evaluation; equal weights at the
            start.
    """
    decisions = [row for row in rows if row["kind"] == "mixing"]
    evaluations = [row for row in rows if row["kind"] == "valid"]
    first, last = evaluations[0], evaluations[-1]
    names = [key.removeprefix("loss/") for key in first if key.startswith("loss/")]
    entries = [
        Tuned(
            name,
            [1 / len(names), *(row[f"weight/{name}"] for row in decisions)],
            first[f"loss/{name}"],
            last[f"loss/{name}"],
        )
        for name in names
    ]
    return [row["step"] for row in decisions], entries


def tuning_table(steps: Sequence[int], entries: Sequence[Tuned]) -> str:
    """Weights by decision beside the losses before and after."""
    head = ("weight of", "at first", *(f"step {step}" for step in steps), "loss before", "after")
    rows = [
        (e.name, *(f"{weight:.3f}" for weight in e.weights), f"{e.before:.3f}", f"{e.after:.3f}")
        for e in entries
    ]
    return table(head, rows)


def tuning_shortcomings(entries: Sequence[Tuned], moved: float = 0.01) -> list[str]:
    """What the tuning did not achieve: empty where the mean loss fell and weights moved by `moved`.

    So few steps do not promise more: the loss of a data set that is hardly drawn may rise.
    """
    missed = []
    losses = zip(*(entry[2:] for entry in entries), strict=True)
    before, after = (sum(column) / len(entries) for column in losses)
    if not after < before:
        missed.append(f"mean held-out loss of the tuning did not fall: {before:.3f} -> {after:.3f}")
    if not any(abs(w - entry.weights[0]) >= moved for entry in entries for w in entry.weights):
        missed.append("the weights of the data sets did not move")
    return missed


def draw_tuning(path: Path, steps: Sequence[int], entries: Sequence[Tuned]) -> None:
    """Weights over the steps, and beside them each loss before and after.

    Args:
        path: PNG file to write.
        steps, entries: of `tuned_sets`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for place, entry in enumerate(entries):
        color = f"C{place}"
        left.plot([0, *steps], entry.weights, "o-", color=color, markersize=4, label=entry.name)
        right.plot([entry.before, entry.after], [place, place], "-", color=color, linewidth=1)
        right.plot(entry.before, place, "o", color="white", markeredgecolor=color)
        right.plot(entry.after, place, "o", color=color)
    left.set(title="weight in the blend, decided by router loads", xlabel="step", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.set(title="held-out loss, before and after (filled)", xlabel="nats per token")
    right.set_yticks(range(len(entries)), [entry.name for entry in entries])
    right.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
