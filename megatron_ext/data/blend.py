"""Which domain each sample of each global batch comes from, under weights that change in training.

There is no index. The state is a few integers per domain, every step is a pure function of it, and
every rank computes the same without communication, so a run can be stopped, resumed on another
grid, and replayed from its log.

How a batch of B is shared out. Weights are multiples of 2**-20, so that a domain's credit (its
share so far less what was drawn) is an exact integer. In each batch a domain gets the whole part of
credit + w*B; the slots left over go, one each, to the domains with a fraction outstanding whose
next sample falls due first, at (1 - fraction) / w further samples. That is Tijdeman's rule for the
chairman assignment problem (Discrete Mathematics 32, 1980): between weight changes every count
stays strictly within one sample of its target. Giving the slots to the largest fractions instead
does not: with many domains and a small batch a count drifts by more than one, and whole parts alone
can then exceed the batch.

Credit is carried over a weight change. Dropping it would be simpler, but a domain that earns less
than a sample between two changes would then never be drawn, silently.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import UserError

UNIT = 2**20
"""Weights and credits are integers, counted in 1 / UNIT."""

_VERSION = 1
_NEVER = np.iinfo(np.int64).max
# Then what raises the smallest weights to one unit can always be taken from the largest.
_MAX_DOMAINS = 2047

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One global batch: slot s takes draw `draw[s]` of domain `domain[s]`."""

    step: int
    domain: NDArray[np.int16]
    """[global_batch_size]"""
    draw: Ints
    """[global_batch_size]; the k-th draw of a domain fixes its epoch and sample."""


class WeightChange(NamedTuple):
    """Weights in force from `step` on."""

    step: int
    weights: tuple[int, ...]
    """In 1 / UNIT, adding up to UNIT."""
    reason: str
    automatic: bool = False
    """Made by the plan itself, because a domain was used up: a replay makes it again."""


def quantise(weights: Sequence[float], names: Sequence[str]) -> Ints:
    """Weights of any scale as multiples of 2**-20 that add up to one. [domains].

    A positive weight stays positive, and weights that are such multiples already come back
    unchanged.

    Raises:
        UserError: a weight that is negative or not finite, all of them zero, or not one for each
            domain.
    """
    given = [float(weight) for weight in weights]
    if len(given) != len(names):
        raise UserError(f"{len(given)} weights for {len(names)} domains", "give one for each")
    for name, weight in zip(names, given, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of domain {name} is {weight}", "give 0 or more")
    total = math.fsum(given)
    if total <= 0:
        raise UserError("all blend weights are 0", "give at least one domain a positive weight")
    exact = np.array(given) / total * UNIT
    units = np.where(exact > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    missing = UNIT - int(units.sum())
    if missing > 0:
        units[np.argsort(units - exact, kind="stable")[:missing]] += 1
    units[np.argmax(units)] += UNIT - int(units.sum())
    return units


class BlendPlan:
    """The blend of a run, advanced one global batch at a time.

    Args:
        names: the domains, in the order of the other arguments.
        num_samples: samples in one epoch of each domain; an empty domain (0) is never drawn.
        weights: of any scale; 0 pauses a domain.
        seed: keys the order of the slots within a batch.
        max_epochs: how often each domain may be read; None (for all, or for one) for no limit. A
            domain that is used up leaves the blend and the others are renormalised.
        lag: steps between the decision of a weight change and its effect, at least the depth of
            prefetching.

    Raises:
        UserError: arguments that do not fit together.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_samples: Sequence[int],
        weights: Sequence[float],
        seed: int,
        max_epochs: float | Sequence[float | None] | None = None,
        lag: int = 1,
    ) -> None:
        self.names = tuple(names)
        count = len(self.names)
        if not 1 <= count <= _MAX_DOMAINS or len(set(self.names)) != count:
            raise UserError(
                f"a blend has 1 to {_MAX_DOMAINS} domains with different names, not {count}: "
                f"{', '.join(self.names[:8])}"
            )
        if len(num_samples) != count or any(size < 0 for size in num_samples):
            raise UserError(f"num_samples {list(num_samples)} does not fit {count} domains")
        if not 0 <= seed < 2**63 or lag < 0:
            raise UserError(f"seed {seed} and lag {lag} of the blend must not be negative")
        self.seed, self.lag, self.step = seed, lag, 0
        self.num_samples: Ints = np.array(num_samples, np.int64)
        self._limit = _draw_limits(self.names, self.num_samples, max_epochs)
        self.drawn: Ints = np.zeros(count, np.int64)
        self.credit: Ints = np.zeros(count, np.int64)
        self._weights = quantise(weights, self.names)
        self._pending: list[WeightChange] = []
        self._log = [WeightChange(0, _ints(self._weights), "initial")]

    @property
    def weights(self) -> list[float]:
        """The weights the last batch was drawn with, or the initial ones; exact."""
        return [weight / UNIT for weight in _ints(self._weights)]

    @property
    def weights_log(self) -> list[dict[str, Any]]:
        """Every change that took effect, for JSON: WeightChange with weights as floats."""
        return [
            change._asdict() | {"weights": [weight / UNIT for weight in change.weights]}
            for change in self._log
        ]

    def epochs_used(self) -> list[float]:
        """Epochs drawn of each domain; 0 for an empty one."""
        return (self.drawn / np.maximum(self.num_samples, 1)).tolist()

    def schedule(self, weights: Sequence[float], decided_at_step: int, reason: str) -> int:
        """Have new weights take effect `lag` steps after they are decided.

        Args:
            weights: of any scale, one for each domain.
            decided_at_step: how many batches were done with when deciding, so `plan.step` in a
                training loop.
            reason: for the log.

        Returns:
            The step whose batch is the first with these weights. A later call for the same step
            replaces this one.

        Raises:
            UserError: bad weights, or a step whose batch has been drawn.
        """
        effective = decided_at_step + self.lag
        if effective < self.step:
            raise UserError(
                f"blend weights decided at step {decided_at_step} would take effect at step "
                f"{effective}, but step {self.step} comes next",
                "schedule them with the current step",
            )
        change = WeightChange(effective, _ints(quantise(weights, self.names)), reason)
        self._pending = [other for other in self._pending if other.step != effective]
        self._pending.append(change)
        self._pending.sort(key=lambda other: other.step)
        return effective

    def replay(self, log: Iterable[dict[str, Any]]) -> None:
        """Take the weights of a logged run (its `weights_log`) as this plan's schedule.

        Raises:
            UserError: the plan has been advanced, or the log does not start at step 0 or does not
                fit the domains.
        """
        entries = [entry for entry in log if not entry["automatic"]]
        if self.step != 0 or not entries or entries[0]["step"] != 0:
            raise UserError("a blend is replayed from step 0, with a log that starts there")
        first, *later = (
            WeightChange(e["step"], _ints(quantise(e["weights"], self.names)), e["reason"])
            for e in entries
        )
        self._weights = np.array(first.weights, np.int64)
        self._log, self._pending = [first], later

    def next_batch(self, batch_size: int) -> Batch:
        """Draw the next global batch. The size may differ from step to step.

        Raises:
            UserError: every domain with a weight is used up, or a batch_size below 1. The plan is
                then unchanged.
        """
        if batch_size < 1:
            raise UserError(f"a global batch of {batch_size} samples", "give at least 1")
        weights, credit, log = self._weights, self.credit, []
        changes = [change for change in self._pending if change.step <= self.step]
        for change in changes:
            log.append(change)
            weights = np.array(change.weights, np.int64)
            credit = _carry(credit, weights)

        counts = np.zeros_like(self.drawn)
        room = self._limit - self.drawn
        while True:
            used_up = (weights > 0) & (room == 0)
            if used_up.any():
                weights = self._without(weights, used_up)
                credit = _carry(credit, weights)
                gone = ", ".join(self.names[d] for d in np.flatnonzero(used_up))
                log.append(WeightChange(self.step, _ints(weights), f"used up: {gone}", True))
            shares, new_credit = _share(credit, weights, batch_size - int(counts.sum()))
            over = shares > room
            if not over.any():
                break
            # The last samples of a domain go into this batch; the rest of it is shared out without
            # the domain.
            counts[over] += room[over]
            room[over] = 0
        counts += shares

        domain = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        starts = np.cumsum(counts) - counts
        draw = np.arange(batch_size) + np.repeat(self.drawn - starts, counts)
        # Raw words of Philox, sorted: numpy guarantees these across its versions, but not
        # Generator.permutation.
        words = np.random.Philox(key=[self.seed, self.step]).random_raw(batch_size)
        slots = np.argsort(words, kind="stable")
        batch = Batch(self.step, domain[slots], draw[slots])

        self._weights, self.credit, self.drawn = weights, new_credit, self.drawn + counts
        self._log.extend(log)
        self._pending = self._pending[len(changes) :]
        self.step += 1
        return batch

    def fork(self) -> "BlendPlan":
        """An independent copy, to look ahead without touching what is checkpointed."""
        # Arrays are replaced, never written to, so that they can be shared; the lists are not.
        other = copy.copy(self)
        other._pending, other._log = list(self._pending), list(self._log)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Everything but the limits, as integers, strings and lists for JSON."""
        return {
            "version": _VERSION,
            "names": list(self.names),
            "num_samples": self.num_samples.tolist(),
            "seed": self.seed,
            "step": self.step,
            "weights": self._weights.tolist(),
            "credit": self.credit.tolist(),
            "drawn": self.drawn.tolist(),
            "pending": [[c.step, list(c.weights), c.reason, c.automatic] for c in self._pending],
            "log": [[c.step, list(c.weights), c.reason, c.automatic] for c in self._log],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. `max_epochs` and `lag` stay as this plan was made with.

        Raises:
            UserError: the state is of other domains, sizes or seed, whose samples would not be the
                same.
        """
        if state["version"] != _VERSION:
            raise UserError(f"the saved blend is of version {state['version']}, not {_VERSION}")
        saved = tuple(state["names"])
        if saved != self.names:
            raise UserError(
                f"the checkpoint blends {', '.join(saved)}; this run {', '.join(self.names)}",
                "resume with the same domains in the same order, and weight 0 for one to leave out",
            )
        for name, was, now in zip(self.names, state["num_samples"], self.num_samples, strict=True):
            if was != now:
                raise UserError(
                    f"domain {name} had {was} samples when the checkpoint was written, now {now}",
                    "resume with the same files and seq_length, or start a new run",
                )
        if state["seed"] != self.seed:
            raise UserError(
                f"the checkpoint's blend has seed {state['seed']}, this run {self.seed}",
                "resume with the same seed",
            )
        self.step = int(state["step"])
        self._weights = np.array(state["weights"], np.int64)
        self.credit = np.array(state["credit"], np.int64)
        self.drawn = np.array(state["drawn"], np.int64)
        self._pending = [WeightChange(s, tuple(w), r, a) for s, w, r, a in state["pending"]]
        self._log = [WeightChange(s, tuple(w), r, a) for s, w, r, a in state["log"]]

    def _without(self, weights: Ints, used_up: NDArray[np.bool_]) -> Ints:
        left = np.where(used_up, 0, weights)
        if not left.any():
            used = zip(self.names, self.epochs_used(), strict=True)
            raise UserError(
                f"step {self.step}: every domain with a weight is used up ("
                + ", ".join(f"{name} {epochs:.2f} epochs" for name, epochs in used)
                + ")",
                "raise max_epochs, add data, give a paused domain a weight, or train fewer steps",
            )
        return quantise(left.tolist(), self.names)


def _ints(values: Ints) -> tuple[int, ...]:
    return tuple(values.tolist())


def _draw_limits(
    names: Sequence[str], num_samples: Ints, max_epochs: float | Sequence[float | None] | None
) -> Ints:
    """How many draws each domain allows, at most. [domains]."""
    if max_epochs is None or isinstance(max_epochs, int | float):
        max_epochs = [max_epochs] * len(names)
    if len(max_epochs) != len(names):
        raise UserError(f"max_epochs has {len(max_epochs)} values for {len(names)} domains")
    limits = []
    for name, size, epochs in zip(names, num_samples.tolist(), max_epochs, strict=True):
        if epochs is not None and not (math.isfinite(epochs) and epochs >= 0):
            raise UserError(f"max_epochs of domain {name} is {epochs}", "give 0 or more, or none")
        limits.append(0 if size == 0 else _NEVER if epochs is None else int(size * epochs))
    return np.array(limits, np.int64)


def _share(credit: Ints, weights: Ints, batch_size: int) -> tuple[Ints, Ints]:
    """Counts, which add up to batch_size, and the credit left over; both [domains]."""
    due = credit + weights * batch_size
    counts = np.maximum(due // UNIT, 0)
    fraction = due - counts * UNIT
    extra = batch_size - int(counts.sum())
    if extra > 0:
        # Compared exactly: fractions over weights up to 2**20 differ by 2**-40 or not at all.
        wait = ((UNIT - fraction) << 40) // np.maximum(weights, 1)
        wait[(weights == 0) | (fraction <= 0)] = _NEVER
        counts[np.argsort(wait, kind="stable")[:extra]] += 1
    while extra < 0:
        # Only after a weight change: so many domains are ahead of their new weights that the whole
        # parts of the others exceed the batch. Those that miss least wait.
        given = np.flatnonzero(counts)
        later = given[np.argsort(fraction[given], kind="stable")[:-extra]]
        counts[later] -= 1
        fraction[later] += UNIT
        extra += len(later)
    return counts, due - counts * UNIT


def _carry(credit: Ints, weights: Ints) -> Ints:
    """Credit under new weights: none for domains without a weight, and adding up to 0 again.

    The side (owed or ahead) that outweighs the other after the loss is scaled down, so that no
    credit grows.
    """
    credit = np.where(weights > 0, credit, 0)
    sign = 1 if credit.sum() > 0 else -1
    side = sign * credit > 0
    large, small = int(np.abs(credit[side]).sum()), int(np.abs(credit[~side]).sum())
    if large == small:
        return credit
    scaled = np.abs(credit[side]) * small // large
    scaled[: small - int(scaled.sum())] += 1
    credit[side] = sign * scaled
    return credit
