"""Packing of sequences into rows of one length, one row after the other.

Minimum bin slack (Gupta and Ho, Production Planning & Control 10, 1999) as Fleszar and Hindi begin
it (Computers & Operations Research 29, 2002): the longest sequence left opens a row, and those join
it that fill the rest best, out of all subsets of what is left. Which of the subsets that fill it as
well decides on what is left for later rows: either of two choices may be far better, so both are
tried. Best fit decreasing, which takes the longest that fits, leaves gaps where short sequences are
few.

Equal rows are made at once, as often as their lengths last: the work grows with the number of
different lengths, not of sequences.
"""

from bisect import bisect_right
from collections import Counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

GOOD_ENOUGH = 0.005
"""Share of the rows that may be empty without another try."""


def pack(lengths: ArrayLike, capacity: int) -> Ints:
    """The row of each sequence; rows are numbered from 0.

    Args:
        lengths: [sequences], each in 1..capacity.
        capacity: room of a row.

    Raises:
        ValueError: a length outside 1..capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths are {lengths.min()}..{lengths.max()}, a row holds {capacity}")
    rows = _pack(lengths, capacity, alike=True)
    if len(rows) and lengths.sum() < (1 - GOOD_ENOUGH) * capacity * (rows.max() + 1):
        others = _pack(lengths, capacity, alike=False)
        rows = others if others.max() < rows.max() else rows
    return rows


def _pack(lengths: Ints, capacity: int, alike: bool) -> Ints:
    by_length = np.argsort(lengths, kind="stable")
    values, starts, counts = np.unique(lengths[by_length], return_index=True, return_counts=True)
    left = dict(zip(values.tolist(), counts.tolist(), strict=True))  # stays in rising order
    start = dict(zip(values.tolist(), starts.tolist(), strict=True))
    row_of = np.empty(len(lengths), np.int64)
    rows = 0
    while left:
        row = _fill(left, capacity, alike)
        copies = min(left[length] // times for length, times in row.items())
        for length, times in row.items():
            taken = by_length[start[length] : start[length] + copies * times]
            row_of[taken] = rows + np.arange(len(taken)) // times
            start[length] += len(taken)
            left[length] -= len(taken)
            if not left[length]:
                del left[length]
        rows += copies
    return row_of


def _fill(left: dict[int, int], capacity: int, alike: bool) -> Counter[int]:
    """The lengths of one row, and how often each.

    Args:
        left: how many sequences there are of each length, in rising order.
        capacity: room of the row.
        alike: of subsets that fill the row as well, the one whose shortest is longest; or the one
            with the longest.
    """
    lengths = list(left)
    longest = lengths[-1]
    row, room = Counter([longest]), capacity - longest
    fitting = lengths[: bisect_right(lengths, room)]
    # Bit t of reached[i]: the first i lengths can add up to t.
    reached, all_totals = [1], (2 << room) - 1
    tried: list[tuple[int, int]] = []
    for length in reversed(fitting) if alike else fitting:
        available = min(left[length] - row[length], room // length)
        totals, step, more = reached[-1], 1, available
        while more:
            times = min(step, more)
            totals |= totals << times * length & all_totals
            more -= times
            step *= 2
        reached.append(totals)
        tried.append((length, available))
        if alike and totals >> room:
            break
    total = reached.pop().bit_length() - 1
    while total:
        (length, available), without = tried.pop(), reached.pop()
        fewest_first = range(available + 1)
        for times in fewest_first if alike else reversed(fewest_first):
            if times * length <= total and without >> (total - times * length) & 1:
                break
        total -= times * length
        if times:
            row[length] += times
    return row
