"""Router loads and learning progress, with their sampling error, around the recipe's weights.

The reasoning and the algebra are in `docs/mixing.md`.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies.base import (
    Bools,
    Floats,
    Signals,
    Strategy,
    choice,
    jsonable,
    normalise,
    number,
    refuse_few,
)
from megatron_ext.mixing.strategies.evidence import (
    DiscountedMean,
    enough_folds,
    jackknife,
    shrink,
    squared_distances,
)

logger = logging.getLogger(__name__)


class LoadProgress(Strategy):
    """w* = w0 * exp(strength * (u - mean u)), normalised, and w moves towards it.

    u_i = r_i * g_i. r_i is the relative distance of data set i's router loads from the others', the
    mean being 1; g_i, from 0 to 1, is its learning progress relative to the median. Both are
    cross-validated, averaged over updates and drawn together as far as sampling error explains how
    they differ: without evidence u is the same for all, and the weights are w0.

    Args:
        names: the data sets of the run.
        strength: how far the weights may leave w0: log(w*_i / w*_j) - log(w0_i / w0_j) is
            strength * (u_i - u_j).
        bound: greatest factor, and its inverse the least, on w0_i before normalising.
        max_change: greatest factor of one update.
        half_life: updates after which a measurement counts half.
        caution: how many times the spread that sampling error alone makes has to be exceeded before
            anything moves.
        progress: what learning progress is read from: `train` loss, held-out (`valid`) loss, or
            `none`.

    Raises:
        UserError: options that do not fit, or a single data set.
    """

    layers = "all"

    def __init__(
        self,
        names: Sequence[str],
        *,
        strength: float = 1.0,
        bound: float = 4.0,
        max_change: float = 1.25,
        half_life: float = 2.0,
        caution: float = 2.0,
        progress: str = "train",
        **options: Any,
    ) -> None:
        super().__init__(names, **options)
        self.strength = number("strength", strength, 0)
        self.bound = number("bound", bound, 1)
        self.max_change = number("max_change", max_change, 1)
        self.caution = number("caution", caution, 0)
        half_life = number("half_life", half_life, 0.01)
        self.progress = choice("progress", progress, ("train", "valid", "none"))
        self.needs = frozenset({"loads"} | {f"{self.progress}_loss"} - {"none_loss"})
        count = len(self.names)
        refuse_few("load_progress", count)
        self._distance = DiscountedMean(count, half_life)
        self._slope = DiscountedMean(count, half_life)
        # The last log loss, its variance, and the update it was measured at.
        self._loss, self._loss_variance, self._loss_round = np.full((3, count), np.nan)
        self._report: dict[str, Any] = {}

    def initial(self, weights: ArrayLike, sizes: ArrayLike) -> Floats:
        start = super().initial(weights, sizes)
        if warning := refuse_few("load_progress", int(np.count_nonzero(start))):
            logger.warning(warning)
        return start

    def update(self, signals: Signals) -> Floats:
        live = signals.weights > 0
        pairs = self._measure_distances(signals, live)
        self._measure_progress(signals)
        distance, sure = self._relative_distance(live)
        progress = self._relative_progress(live)
        utility = distance * progress
        weights = self._move(signals, live, utility)
        self._report = {
            "distance": jsonable(np.where(live, distance, np.nan)),
            "progress": jsonable(np.where(live, progress, np.nan)),
            "utility": jsonable(np.where(live, utility, np.nan)),
            "confidence": jsonable(np.where(live, sure, np.nan)),
            "distances": jsonable(pairs),
        }
        return weights

    def _measure_distances(self, signals: Signals, live: Bools) -> Floats:
        """Add this round's mean squared distances to the evidence; the pairs' ones [D, D]."""
        assert signals.counts is not None
        counts = _nonempty(signals.counts[:, :, list(signals.layers)])
        if len(counts) < 3:
            raise UserError(
                f"mixing strategy load_progress got router loads of {len(counts)} steps or batches",
                "it takes at least 3, to tell sampling error: raise the interval or probe_samples",
            )
        known = live & enough_folds((counts.sum(-1) > 0).all(-1))
        pairs = np.full((len(live), len(live)), np.nan)
        if known.sum() < 2:
            return pairs
        between, without = squared_distances(counts[:, known])
        pairs[np.ix_(known, known)] = between
        others = known.sum() - 1
        # Only differences between data sets matter, so that the error they share does not.
        away = without.sum(-1) / others
        away = away - away.mean(-1, keepdims=True)
        delta, variance = np.full((2, len(live)), np.nan)
        delta[known] = between.sum(-1) / others
        variance[known] = jackknife(away)
        self._distance.add(delta, variance, counts.sum((0, 2, 3)).astype(np.float64))
        return pairs

    def _measure_progress(self, signals: Signals) -> None:
        """Add this round's drop of each log loss, per update, to the evidence."""
        now, variance = np.full((2, len(self.names)), np.nan)
        weight = np.ones(len(self.names))
        if self.progress == "valid":
            assert signals.valid_loss is not None
            known = np.isfinite(signals.valid_loss) & (signals.valid_loss > 0)
            now[known] = _log(signals.valid_loss[known])
            variance[known] = 0.0  # always the same tokens, so that their choice cancels
        elif self.progress == "train":
            assert signals.train_loss is not None
            folds = _nonempty(signals.train_loss)
            total = folds.sum(0)
            known = enough_folds(folds[..., 1] > 0) & (total[:, 0] > 0)
            now[known] = _log(total[known, 0] / total[known, 1])
            rest = (total - folds)[:, known]
            means = rest[..., 0] / rest[..., 1]
            variance[known] = jackknife(np.where(folds[:, known, 1] > 0, means, np.nan)) / (
                (total[known, 0] / total[known, 1]) ** 2
            )
            weight = total[:, 1]
        updates = signals.round - self._loss_round
        self._slope.add(
            (self._loss - now) / updates, (self._loss_variance + variance) / updates**2, weight
        )
        known = np.isfinite(now)
        self._loss = np.where(known, now, self._loss)
        self._loss_variance = np.where(known, variance, self._loss_variance)
        self._loss_round = np.where(known, signals.round, self._loss_round)

    def _relative_distance(self, live: Bools) -> tuple[Floats, Floats]:
        """r [D], mean 1 over live data sets, and how much of each deviation was believed [D]."""
        values, variances = self._distance.estimate()
        values = np.where(live, values, np.nan)
        known = np.isfinite(values)
        # Distances below their own error are no distances: without this, ratios of noise.
        error = self.caution * math.sqrt(np.median(variances[known])) if known.any() else 0.0
        values, share = shrink(values, variances, self.caution)
        # Only here, at the end, may an estimate not be negative.
        values = np.maximum(values, 0.0) + error
        mean = values[live].mean() if live.any() else 0.0
        return (values / mean if mean > 0 else np.ones_like(values)), share

    def _relative_progress(self, live: Bools) -> Floats:
        """g [D] in [0, 1]. A rising loss is progress to be made again, so the sign is dropped."""
        values, variances = self._slope.estimate()
        values, _ = shrink(np.where(live, values, np.nan), variances, self.caution)
        speed = np.abs(values)
        median = float(np.median(speed[live])) if live.any() else 0.0
        return np.minimum(speed / median, 1.0) if median > 0 else np.ones_like(speed)

    def _move(self, signals: Signals, live: Bools, utility: Floats) -> Floats:
        """The next weights: on the way from those in force to the target, at most max_change."""
        anchor = np.where(signals.initial_weights > 0, signals.initial_weights, signals.weights)
        limit = math.log(self.bound)
        tilt = self.strength * (utility[live] - utility[live].mean())
        tilt = np.minimum(np.maximum(tilt, -limit), limit)
        step = tilt - _log(signals.weights[live] / anchor[live])
        # A constant does not matter; this one makes the largest change least.
        step = step - (step.max() + step.min()) / 2
        largest = float(np.abs(step).max())
        most = math.log(self.max_change) / 2
        if largest > most:
            step = step * (most / largest)
        result = signals.weights.copy()
        result[live] *= [math.exp(s) for s in step]
        return normalise(result)

    def report(self) -> dict[str, Any]:
        return self._report

    def state_dict(self) -> dict[str, Any]:
        return {
            "distance": self._distance.state_dict(),
            "slope": self._slope.state_dict(),
            "loss": jsonable(self._loss),
            "loss_variance": jsonable(self._loss_variance),
            "loss_round": jsonable(self._loss_round),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._distance.load_state_dict(state["distance"])
        self._slope.load_state_dict(state["slope"])
        # None, for JSON, becomes NaN again.
        self._loss = np.array(state["loss"], np.float64)
        self._loss_variance = np.array(state["loss_variance"], np.float64)
        self._loss_round = np.array(state["loss_round"], np.float64)


def _nonempty(folds: NDArray[Any]) -> NDArray[Any]:
    """Without the folds of steps that were not made [F, ...]."""
    return folds[folds.any(axis=tuple(range(1, folds.ndim)))]


def _log(values: Floats) -> Floats:
    return np.array([math.log(value) for value in values])
