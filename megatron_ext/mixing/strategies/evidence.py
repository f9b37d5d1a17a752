"""Measurements with their sampling error: what a strategy may believe, and how far.

D data sets, L layers, E experts, F folds (independent samples of the same quantities).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.mixing.strategies.base import Bools, Floats, jsonable


def enough_folds(sampled: Bools) -> Bools:
    """Data sets [D] with tokens in so many folds that any two of them share at least three.

    Three is what a cross-validated estimate and its jackknife take: two folds to multiply, and one
    to leave out.

    Args:
        sampled: whether a fold has tokens of a data set [F, D].
    """
    return 2 * sampled.sum(0) >= len(sampled) + 3


def squared_distances(counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """E * |p_i - p_j|^2, mean over layers, of the load distributions p, free of sampling noise.

    For two folds f != g the product (p_i^f - p_j^f) . (p_i^g - p_j^g) has |p_i - p_j|^2 as its
    expectation, because the errors of two folds are independent; the square of one estimate also
    has their variance. The products are averaged with weights h_f h_g, h = N_i N_j / (N_i + N_j)
    for the N picks of a fold: the precision of a difference of two such samples. Unbiased, so an
    estimate can be negative.

    Args:
        counts: picks of data sets that have `enough_folds` [F, D, L, E].

    Returns:
        The distances [D, D], and the same with each fold left out [F, D, D].
    """
    folds, sets, _, experts = counts.shape
    picks = counts.sum(-1).astype(np.float64)
    loads = counts / np.maximum(picks, 1)[..., None]
    distances = np.zeros((sets, sets))
    without = np.zeros((folds, sets, sets))
    for i in range(sets):
        for j in range(i):
            ni, nj = picks[:, i], picks[:, j]
            h = ni * nj / np.maximum(ni + nj, 1)
            q = h[..., None] * (loads[:, i] - loads[:, j])
            own, total = (q * q).sum(-1), q.sum(0)
            cross = (total * total).sum(-1) - own.sum(0)
            pairs = h.sum(0) ** 2 - (h * h).sum(0)
            distances[i, j] = distances[j, i] = experts * (cross / pairs).mean()
            cross = ((total - q) ** 2).sum(-1) - (own.sum(0) - own)
            pairs = (h.sum(0) - h) ** 2 - ((h * h).sum(0) - h * h)
            without[:, i, j] = without[:, j, i] = experts * (cross / pairs).mean(-1)
    return distances, without


def jackknife(without: Floats) -> Floats:
    """Variance of an estimate from the estimates with each fold left out [F, ...] -> [...].

    A fold in which there was nothing to leave out is NaN and not counted.
    """
    folds = np.isfinite(without).sum(0)
    away = without - np.nansum(without, 0) / folds
    return np.nansum(away**2, 0) * (folds - 1) / folds


class DiscountedMean:
    """Mean of repeated measurements [D] in which older ones count less, with its variance.

    Args:
        count: D.
        half_life: measurements after which one counts half.
    """

    def __init__(self, count: int, half_life: float) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._total, self._weight, self._variance = np.zeros((3, count))

    def add(self, values: Floats, variances: Floats, weights: Floats) -> None:
        """Take one measurement of each data set; NaN where there is none."""
        known = np.isfinite(values)
        weights = np.where(known, weights, 0.0)
        values, variances = np.where(known, values, 0.0), np.where(known, variances, 0.0)
        self._total = self._decay * self._total + weights * values
        self._weight = self._decay * self._weight + weights
        self._variance = self._decay**2 * self._variance + weights**2 * variances

    def estimate(self) -> tuple[Floats, Floats]:
        """Means and their variances [D]; NaN where nothing was measured yet."""
        weight = np.where(self._weight > 0, self._weight, np.nan)
        return self._total / weight, self._variance / weight**2

    def state_dict(self) -> dict[str, Any]:
        return {
            "total": jsonable(self._total),
            "weight": jsonable(self._weight),
            "variance": jsonable(self._variance),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._total = np.array(state["total"], np.float64)
        self._weight = np.array(state["weight"], np.float64)
        self._variance = np.array(state["variance"], np.float64)


def shrink(values: Floats, variances: Floats, caution: float) -> tuple[Floats, Floats]:
    """Draw measurements together as far as sampling error explains how they differ.

    The random-effects model of meta-analysis: true values spread with a variance tau^2 around their
    mean, each is seen with its own sampling variance. tau^2 is DerSimonian and Laird's estimate
    (Controlled Clinical Trials 7, 1986), from the excess of Q over `caution` times what sampling
    error alone makes of it. The result is the posterior mean, as in James and Stein's estimator.

    Args:
        values: measurements [D]; NaN where there is none.
        variances: of these [D].
        caution: 1 for the plain estimate; more asks for clearer evidence.

    Returns:
        The values drawn together, the mean for those not measured [D]; and the share that is left
        of each one's deviation, 0 to 1 [D]. Fewer than 3 measurements tell nothing.
    """
    known = np.isfinite(values)
    share = np.zeros_like(values)
    if known.sum() < 3:
        mean = values[known].mean() if known.any() else 0.0
        return np.full_like(values, mean), share
    y, v = values[known], variances[known]
    # A variance from a few folds is itself uncertain; none is believed to be below the median. The
    # spread's own rounding error is a floor where there is no sampling error at all.
    v = np.maximum(v, max(float(np.median(v)), 1e-12 * float(y.var()), 1e-300))
    a = v.min() / v
    mean = (a * y).sum() / a.sum()
    q = (a * (y - mean) ** 2).sum()
    spread = q - caution * v.min() * (len(y) - 1)
    tau2 = max(0.0, float(spread / (a.sum() - (a * a).sum() / a.sum())))
    share[known] = tau2 / (tau2 + v)
    return np.where(known, mean + share * (np.where(known, values, mean) - mean), mean), share
