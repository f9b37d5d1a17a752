"""What the benchmarks share: a row for each measurement, and the table and file they go into.

A benchmark is run as a script (`python benchmarks/NAME.py`), so it says `from report import row,
write`.
"""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench"
_COLUMNS = ("metric", "unit", "ours", "peer", "limit", "ratio", "bar", "met")

Row = dict[str, Any]


def row(
    metric: str,
    unit: str,
    ours: float,
    peer: float | None = None,
    limit: float | None = None,
    bar: float | None = None,
    higher_is_better: bool = True,
) -> Row:
    """One measurement beside what it is held against, all in `unit`.

    Args:
        metric: what was measured, and under which conditions.
        unit: of ours, peer, limit and bar.
        ours: our figure.
        peer: that of the software we are compared with, from the same run.
        limit: what the machine itself can do, from the same run.
        bar: what `ours` has to reach; for "5 times the peer" give 5 * peer.
        higher_is_better: false for times and sizes.

    Returns:
        The arguments, with `ratio`, how many times better than the peer (without one: than the
        limit) ours is, and `met`, whether it reaches the bar; both None where there is nothing to
        compare with.
    """
    reference = limit if peer is None else peer
    ratio = met = None
    if reference is not None:
        above, below = (ours, reference) if higher_is_better else (reference, ours)
        ratio = above / below if below else float("inf")
    if bar is not None:
        met = ours >= bar if higher_is_better else ours <= bar
    return {
        "metric": metric,
        "unit": unit,
        "ours": ours,
        "peer": peer,
        "limit": limit,
        "ratio": ratio,
        "bar": bar,
        "met": met,
    }


def write(name: str, rows: list[Row]) -> Path:
    """Print the rows as a table, write them to results/bench/`name`.json, return its path."""
    cells = [_COLUMNS, *(tuple(_cell(r[column]) for column in _COLUMNS) for r in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(_COLUMNS))]
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(left + right).rstrip())
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rows, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
