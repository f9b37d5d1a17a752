"""Best-fit-decreasing packing of sequences into rows of one length.

Johnson, "Near-optimal bin packing algorithms" (1973): the longest sequence first, each into the row
that it fills best, a new row where it fits into none. Sequences of one length are placed together:
the row with the least room that suffices takes as many of them as fit, because what is left then is
less room still. The work grows with the number of different lengths, not of sequences.
"""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The row of each sequence; rows are numbered from 0.

    Args:
        lengths: [sequences], each in 1..capacity.
        capacity: room of a row.

    Raises:
        ValueError: a length outside 1..capacity.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths are {lengths.min()}..{lengths.max()}, a row holds {capacity}")
    rooms = _Rooms()
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, firsts, counts = np.unique(-lengths[by_length], return_index=True, return_counts=True)
    rows = 0
    for value, first, count in zip(values.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        length, placed = -value, 0
        while placed < count:
            room = rooms.least(length)
            if room is None:
                room, fit = capacity, capacity // length
                new = -(-(count - placed) // fit)
                taken = np.arange(rows, rows + new)
                rows += new
            else:
                fit = room // length
                taken = rooms.take(room, -(-(count - placed) // fit))
            here = min(len(taken) * fit, count - placed)
            chosen = by_length[first + placed : first + placed + here]
            row_of[chosen] = np.repeat(taken, fit)[:here]
            placed += here
            # All rows are filled alike but the last, which may get fewer.
            last = here - (len(taken) - 1) * fit
            rooms.put(room - fit * length, taken[:-1])
            rooms.put(room - last * length, taken[-1:])
    return row_of


class _Rooms:
    """Rows by the room left in them."""

    def __init__(self) -> None:
        self._rows: defaultdict[int, Ints] = defaultdict(lambda: np.empty(0, np.int64))
        self._present = 0
        """Bit r is set where there are rows with room r."""

    def least(self, length: int) -> int | None:
        """The smallest room of at least `length`."""
        enough = self._present >> length
        return length + (enough & -enough).bit_length() - 1 if enough else None

    def take(self, room: int, count: int) -> Ints:
        """At most `count` rows with this room, which must have some."""
        taken, left = self._rows[room][:count], self._rows[room][count:]
        self._rows[room] = left
        if not len(left):
            self._present &= ~(1 << room)
        return taken

    def put(self, room: int, rows: Ints) -> None:
        if room and len(rows):
            self._rows[room] = np.concatenate((self._rows[room], rows))
            self._present |= 1 << room
