"""One data set after the other (MoE-SFT's baseline)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_ext.mixing.strategies.base import (
    Floats,
    Signals,
    Strategy,
    choice,
    normalise,
    number,
    whole,
)


class Sequential(Strategy):
    """One data set at a time; after the last, the first again.

    Args:
        names: the data sets of the run.
        period: updates that a data set's turn lasts (the paper: 500 steps, so 5 updates at an
            interval of 100).
        order: `alphabetical`, as the paper, or `recipe`.
        rest: weight of each other data set meanwhile, against 1. Not 0, which pauses it for good.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        period: int = 1,
        order: str = "alphabetical",
        rest: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(names, **options)
        self.period = whole("period", period, 1)
        self.rest = number("rest", rest, 1e-6, 1)
        places = range(len(self.names))
        alphabetical = choice("order", order, ("alphabetical", "recipe")) == "alphabetical"
        self._order = sorted(places, key=lambda i: self.names[i]) if alphabetical else list(places)

    def initial(self, weights: ArrayLike, sizes: ArrayLike) -> Floats:
        start = super().initial(weights, sizes)
        return self._turn(start, start, 0)

    def update(self, signals: Signals) -> Floats:
        turn = (signals.round + 1) // self.period
        return self._turn(signals.initial_weights, signals.weights, turn)

    def _turn(self, initial: Floats, weights: Floats, turn: int) -> Floats:
        order = [i for i in self._order if initial[i] > 0]
        # A data set that is used up by now gives its turn to the next one.
        following = [order[(turn + i) % len(order)] for i in range(len(order))]
        chosen = next((i for i in following if weights[i] > 0), following[0])
        result = np.where(weights > 0, self.rest, 0.0)
        result[chosen] = 1.0
        return normalise(result)
