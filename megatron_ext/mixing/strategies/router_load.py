"""Weights that follow how differently each data set uses the experts (MoE-SFT)."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_ext.mixing.strategies.base import (
    Bools,
    Floats,
    Signals,
    Strategy,
    choice,
    exponentiated,
    jsonable,
    number,
    refuse_few,
)
from megatron_ext.mixing.strategies.distances import l2_distances

logger = logging.getLogger(__name__)


class RouterLoad(Strategy):
    """alpha = softmax(log w + eta * Delta); w' = (1 - c) * alpha + c / n.

    MoE-SFT (arXiv 2406.11256), algorithm 1. With o_i the loads of data set i, normalised to 1,
    Delta_i = sum_j |o_i - o_j| / n over all n data sets, itself among them. The paper takes the
    last layer, and so does this by default; over several layers Delta is their mean.

    Args:
        names: the data sets of the run.
        eta: step size.
        c: share that is spread evenly.
        distance: `l2`; `cosine`, where Delta_i is 1 less the mean cosine similarity; or `inverse`,
            the l2 values dealt out in reversed order (the paper's counter-check).

    Raises:
        UserError: options that do not fit, or a single data set.
    """

    needs = frozenset({"loads"})
    layers = "last"

    def __init__(
        self,
        names: Sequence[str],
        *,
        eta: float = 10.0,
        c: float = 0.05,
        distance: str = "l2",
        **options: Any,
    ) -> None:
        super().__init__(names, **options)
        self.eta = number("eta", eta, 0)
        self.c = number("c", c, 0, 1)
        self.distance = choice("distance", distance, ("l2", "cosine", "inverse"))
        refuse_few("router_load", len(self.names))
        self._report: dict[str, Any] = {}

    def initial(self, weights: ArrayLike, sizes: ArrayLike) -> Floats:
        start = super().initial(weights, sizes)
        if warning := refuse_few("router_load", int(np.count_nonzero(start))):
            logger.warning(warning)
        return start

    def update(self, signals: Signals) -> Floats:
        assert signals.counts is not None
        counts = signals.counts.sum(0)[:, list(signals.layers)].astype(np.float64)
        # Paused data sets, and those that no token was drawn of, are not compared.
        known: Bools = (signals.weights > 0) & (counts.sum(-1) > 0).all(-1)
        pairs = np.full((len(known), len(known)), np.nan)
        delta = np.full(len(known), np.nan)
        if known.any():
            between = self._pairs(counts[known])
            pairs[np.ix_(known, known)] = between
            delta[known] = between.mean(-1)
        if self.distance == "inverse":
            order = np.argsort(delta[known], kind="stable")
            delta[np.flatnonzero(known)[order]] = delta[known][order[::-1]]
        self._report = {"distance": jsonable(delta), "distances": jsonable(pairs)}
        return exponentiated(signals.weights, delta, self.eta, self.c)

    def report(self) -> dict[str, Any]:
        return self._report

    def _pairs(self, counts: Floats) -> Floats:
        """Distances [n, n], mean over layers, of counts [n, layers, E]."""
        loads = counts / counts.sum(-1, keepdims=True)
        if self.distance == "cosine":
            unit = loads / np.sqrt((loads**2).sum(-1, keepdims=True))
            return np.array([(1 - (unit * own).sum(-1)).mean(-1) for own in unit])
        return l2_distances(loads)
