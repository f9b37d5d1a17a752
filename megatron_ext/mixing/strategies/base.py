"""What a mixing strategy sees, and what it has to be.

D data sets, L layers of the model, E experts, F folds.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import published

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Signals:
    """What a strategy may look at; the same on every rank."""

    step: int
    """Optimizer steps done."""
    round: int
    """Updates done before this one."""
    names: tuple[str, ...]
    """Data sets, in the order of every [D] below."""
    weights: Floats
    """In force [D], adding up to 1; 0 for a data set that is paused or used up."""
    initial_weights: Floats
    """What the run started with [D], adding up to 1."""
    sizes: NDArray[np.int64]
    """Tokens in one epoch [D]."""
    epochs: Floats
    """Epochs drawn so far [D]."""
    layers: tuple[int, ...]
    """MoE layers chosen by the recipe, ascending indices into L."""
    counts: NDArray[np.int64] | None
    """Picks (token, expert) since the last update, or of the probe [F, D, L, E]. A fold is every
    F-th step (or batch of the probe): folds are independent samples of the same quantities.
    """
    mass: Floats | None
    """Summed routing weights of these picks [F, D, L, E]."""
    train_loss: Floats | None
    """Summed loss and trained tokens since the last update [F, D, 2]."""
    valid_loss: Floats | None
    """Held-out loss now [D]; NaN where not known."""
    seed: int
    """Of the run."""


class Strategy(ABC):
    """Decides the blend weights of a run.

    A subclass takes its options as keyword-only arguments and hands the rest on (`**options`). All
    arithmetic is float64 in a fixed order (`math.exp`, `math.fsum`, elementwise numpy and its sums;
    no BLAS), because every rank decides for itself and all must decide the same.

    Args:
        names: the data sets of the run.
        initial: the weights to start with: `recipe`, `uniform`, `data_size` (tokens), a published
            mixture by name, or a weights log (a path that ends in .jsonl), whose last are taken.

    Raises:
        UserError: options that do not fit.
    """

    needs: frozenset[str] = frozenset()
    """Signals that `update` looks at, of {"loads", "train_loss", "valid_loss"}; an instance may
    set its own.
    """
    changes: bool = True
    """False: never updated."""
    layers: str = "last"
    """MoE layers it looks at where the recipe does not say (`mixing.layers`)."""

    def __init__(self, names: Sequence[str], *, initial: str = "recipe") -> None:
        self.names = tuple(names)
        self._logged: list[float] | None = None
        if str(initial).endswith(".jsonl"):
            from megatron_ext.mixing.strategies.weights_log import read_log  # it imports this

            self._logged = read_log(Path(initial), self.names)[-1]["weights"]
            return
        known = ("recipe", "uniform", "data_size", *published.MIXTURES)
        self._initial = choice("initial", initial, (*known, "a weights log (FILE.jsonl)"))

    def initial(self, weights: ArrayLike, sizes: ArrayLike) -> Floats:
        """Weights to start with [D], adding up to 1.

        Args:
            weights: of the recipe, any scale [D]; a data set with 0 is paused and stays so.
            sizes: tokens in one epoch [D].

        Raises:
            UserError: no data set has a weight, or a published mixture is of other domains.
        """
        given = np.asarray(weights, np.float64)
        live = given > 0
        start = given
        if self._logged is not None:
            start = np.array(self._logged)
        elif self._initial == "uniform":
            start = np.ones_like(given)
        elif self._initial == "data_size":
            start = np.asarray(sizes, np.float64)
        elif self._initial != "recipe":
            start = np.zeros_like(given)
            names = [name for name, alive in zip(self.names, live, strict=True) if alive]
            start[live] = published.lookup(self._initial, published.MIXTURES, names)
        return normalise(np.where(live, start, 0.0))

    @abstractmethod
    def update(self, signals: Signals) -> Floats:
        """New weights [D], adding up to 1: a pure function of the signals and this state."""

    def weights_log(self, initial: Floats) -> list[dict[str, Any]] | None:
        """Weights known in advance, as `BlendPlan.replay` takes them, after these initial ones;
        none where they are decided in training.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `update` remembers, for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (nothing to do is fine)
        """Go on where `state` was taken."""

    def report(self) -> dict[str, Any]:
        """Numbers behind the last update for the log: lists [D] or [D][D], none where unknown."""
        return {}


def allowed_options(cls: type) -> list[str]:
    """The options of a strategy class: keyword-only arguments, its own and those handed on to."""
    names: list[str] = []
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """An option as a finite number in [low, high]. YAML reads `1e-4` as a string: taken too."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not (math.isfinite(result) and low <= result <= high):
        bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (
            high < math.inf
        )
        raise UserError(
            f"mixing option {name}={value!r}", f"give a number {' and '.join(bounds)}".rstrip()
        )
    return result


def whole(name: str, value: Any, low: int) -> int:
    """An option as a whole number of at least `low`."""
    result = number(name, value, low)
    if result != int(result):
        raise UserError(f"mixing option {name}={value!r}", "give a whole number")
    return int(result)


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """An option that is one of `known`."""
    if value not in known:
        raise UserError(f"mixing option {name}={value!r}", f"one of {', '.join(known)}")
    return value


def normalise(weights: Floats) -> Floats:
    """Scaled to add up to 1."""
    total = math.fsum(weights)
    if not (math.isfinite(total) and total > 0):
        raise UserError(
            f"blend weights {weights.tolist()} do not add up to anything",
            "give at least one data set that is not empty a positive weight",
        )
    return weights / total


def exponentiated(weights: Floats, scores: Floats, eta: float, c: float) -> Floats:
    """The papers' update: alpha = softmax(log w + eta * score), then (1 - c) * alpha + c / n.

    Over the n data sets that have a weight; 0 stays 0. One with an unknown score (NaN) keeps its
    share in alpha, and the others share the rest.
    """
    live = weights > 0
    known = live & np.isfinite(scores)
    alpha = weights.copy()
    if known.any():
        exponents = eta * scores[known]
        factors = np.array([math.exp(e) for e in exponents - exponents.max()])
        raised = weights[known] * factors
        alpha[known] = raised * (math.fsum(weights[known]) / math.fsum(raised))
    smoothed = (1 - c) * alpha + c / max(int(live.sum()), 1)
    return normalise(np.where(live, smoothed, 0.0))


def refuse_few(strategy: str, count: int) -> str | None:
    """What is wrong with comparing so few data sets.

    Two data sets are equally far from each other, so that no distance tells them apart.

    Returns:
        A warning for 2; none for more.

    Raises:
        UserError: fewer than 2.
    """
    if count < 2:
        raise UserError(
            f"mixing strategy {strategy} compares data sets, and the blend has {count}",
            "blend at least 3, or take strategy static",
        )
    if count == 2:
        return (
            f"mixing strategy {strategy} with 2 data sets: each is as far from the other, so the "
            "loads cannot tell them apart and the weights are only smoothed; it takes 3 or more"
        )
    return None


def jsonable(values: ArrayLike) -> Any:
    """An array as lists, with none for what is not finite."""
    array = np.asarray(values, np.float64)
    if array.ndim == 0:
        return float(array) if np.isfinite(array) else None
    return [jsonable(row) for row in array]
