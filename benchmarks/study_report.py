"""What the reports of studies have in common: results by seed, compared in pairs, and the text.

A report has one generated part, between two comments; what is written around it by hand stays.
"""

import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paired import Difference, paired

from megatron_ext.errors import UserError
from megatron_ext.files import written_whole

Row = dict[str, Any]
END = "<!-- generated: end -->"


class Results:
    """Runs by name and seed: settings on the first line of a .jsonl file, a run on each other one.

    Args:
        path: of the file.
        key: of a run's name: what the study compares.
        base: name of the runs that others are compared with.

    Raises:
        UserError: there are none.
    """

    def __init__(self, path: Path, key: str, base: str) -> None:
        if not path.is_file():
            raise UserError(f"{path} does not exist", "run the study first")
        self.settings, *runs = (json.loads(line) for line in path.read_text().splitlines())
        self.base = base
        self.runs: dict[str, dict[int, Row]] = {}
        for run in runs:
            self.runs.setdefault(run[key], {})[run["seed"]] = run
        if base not in self.runs:
            raise UserError(f"{path} holds no run of {base}", "it is what others are compared with")
        self.names = list(next(iter(self.runs[base].values()))["loss"])
        """Data sets."""
        self.others = [name for name in self.runs if name != base]
        self.cells = {
            (name, column): self.difference(name, column=column)
            for name in self.others
            for column in (None, *self.names)
        }
        """Differences to the base: of the mean (None) and of each data set."""

    def losses(self, name: str, column: str | None = None) -> dict[int, float]:
        """Held-out loss by seed: of one data set, or the mean of all (each counts alike)."""
        return {
            seed: run["loss"][column] if column else statistics.fmean(run["loss"].values())
            for seed, run in self.runs[name].items()
        }

    def mean(self, name: str, column: str | None = None) -> float:
        """The same over all seeds."""
        return statistics.fmean(self.losses(name, column).values())

    def difference(
        self, name: str, other: str | None = None, column: str | None = None
    ) -> Difference | None:
        """To another's runs (none: the base's); None where the two have no seed in common."""
        other = self.base if other is None else other
        if name not in self.runs or other not in self.runs:
            return None
        ours, theirs = self.losses(name, column), self.losses(other, column)
        return paired(ours, theirs) if ours.keys() & theirs.keys() else None


def claims_table(results: Results, claims: Iterable[tuple[str, str, str]]) -> list[str]:
    """Claims (first, second, text) that the first has the lower loss, and what the pairs say."""
    lines = [
        "| claim | compared | difference | lower in | verdict |",
        "|---|---|---|---|---|",
    ]
    for first, second, claim in claims:
        if found := results.difference(first, second):
            verdict = {-1: "holds here", 0: "cannot be told", 1: "the reverse here"}[found.sign]
            lines.append(
                f"| {claim} | {first} - {second} | {interval(found)} | {found.below} of "
                f"{found.pairs} | {verdict} |"
            )
    return lines


def interval(found: Difference | None) -> str:
    """A difference and its interval in a cell."""
    if found is None:
        return "-"
    if found.pairs < 2:
        return f"{found.mean:+.4f} [one seed]"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def trained_on(base: Row, steps: str) -> str:
    """Tokens of a training of the study's base models."""
    return f"{base[steps] * base['global_batch_size'] * base['seq_length']:,}"


def write_generated(path: Path, title: str, source: str, lines: Sequence[str]) -> None:
    """Put paragraphs and tables into the generated part of a text, which is begun where there is
    none.
    """
    begin = f"<!-- generated from {source}: begin -->"
    before, after = f"# {title}\n\n", ""
    if path.is_file():
        before, found, rest = path.read_text().partition(begin)
        after = rest.partition(END)[2] if found else ""
    text = "\n".join([begin, "", *map(_wrapped, lines), "", END])
    with written_whole(path) as partial:
        partial.write_text(f"{before}{text}{after or chr(10)}")


def _wrapped(line: str) -> str:
    """A paragraph or list item on lines of at most 120 characters; tables stay."""
    if line.startswith("|"):
        return line
    indent = "  " if line.startswith("- ") else ""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, 120, subsequent_indent=indent, **options)
