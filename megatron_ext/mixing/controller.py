"""Every m steps: from what routers and losses did to the weights of the blend.

The controller is the same on every rank: it is given sums over the grid, and strategies compute in
float64 in a fixed order, so that all ranks arrive at the same bits without talking to each other.
D data sets, L layers, E experts, F folds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ext.config import MixingConfig, ModelConfig
from megatron_ext.data.blend import BlendPlan
from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import Signals, Strategy

logger = logging.getLogger(__name__)

FOLDS = 8
"""Independent shares that loads and losses are kept in, so that a strategy can tell a difference
from chance.
"""


class Loads(NamedTuple):
    """Router loads by fold."""

    counts: NDArray[np.int64]
    """Picks (token, expert) [F, D, L, E]."""
    mass: NDArray[np.float64]
    """Summed routing weights of these picks [F, D, L, E]."""


@dataclass(frozen=True)
class Update:
    """One decision, for the log."""

    step: int
    """Optimizer steps done."""
    effective: int
    """The first batch with the new weights is that of this step (from 0)."""
    before: dict[str, float]
    after: dict[str, float]
    loads: dict[str, list[float]]
    """Share of each expert in each data set's picks [E], mean over the chosen layers; empty where
    the strategy looks at no loads.
    """
    report: dict[str, Any]
    """The strategy's own numbers, lists [D] or [D][D]."""


class Controller:
    """Collects signals and has the strategy decide.

    Args:
        mixing: the recipe's section.
        strategy: made for the plan's domains.
        plan: whose weights change.
        initial_weights: what the plan started with [D].
        sizes: tokens in an epoch [D].
        model: whose routers are counted.

    Raises:
        UserError: the recipe asks for what cannot be.
    """

    def __init__(
        self,
        mixing: MixingConfig,
        strategy: Strategy,
        plan: BlendPlan,
        initial_weights: NDArray[np.float64],
        sizes: NDArray[np.int64],
        model: ModelConfig,
    ) -> None:
        self.name, self.strategy = mixing.strategy, strategy
        self.plan, self.interval = plan, mixing.interval
        self._initial, self._sizes, self._seed = initial_weights, sizes, plan.seed
        self._probes = mixing.signal == "probe"
        self.round = 0
        if not strategy.changes:
            return
        if mixing.interval <= plan.lag:
            raise UserError(
                f"mixing.interval={mixing.interval} is not above {plan.lag}, the steps that a new "
                "weight takes to come into force (num_prefetch)",
                f"set it to {plan.lag + 1} or more; the papers use 50 to 170",
            )
        if "loads" in strategy.needs and not model.is_moe:
            raise UserError(
                f"mixing strategy {mixing.strategy} looks at router loads, and the model is dense",
                "train a MoE, or take a strategy that looks at losses",
            )
        self.layers = choose_layers(mixing.layers or strategy.layers, model)
        self._shape = (FOLDS, len(plan.names), model.num_layers, model.num_experts or 0)
        self._start_afresh()

    @property
    def needs_probe(self) -> bool:
        """Whether `update` is to be given the loads of a probe."""
        return self._probes and self.strategy.changes and "loads" in self.strategy.needs

    @property
    def needs_losses(self) -> bool:
        """Whether `update` is to be given held-out losses."""
        return self.strategy.changes and "valid_loss" in self.strategy.needs

    def observe(
        self,
        step: int,
        losses: NDArray[np.float64],
        counts: NDArray[np.int64] | None,
        mass: NDArray[np.float64] | None,
    ) -> None:
        """Take in a training step.

        Args:
            step: number of the step (from 0); its remainder is its fold.
            losses: summed loss and trained tokens [2, D].
            counts, mass: picks and their weights [D, L, E].
        """
        if not self.strategy.changes:
            return
        fold = step % FOLDS
        self._train_loss[fold] += losses.T
        if counts is not None and mass is not None and not self._probes:
            self._counts[fold] += counts
            self._mass[fold] += mass

    def is_due(self, step: int) -> bool:
        """Whether `update` is to be called after this many steps."""
        return self.strategy.changes and step > 0 and step % self.interval == 0

    def update(
        self, step: int, probed: Loads | None = None, losses: dict[str, float] | None = None
    ) -> Update:
        """Decide on new weights and hand them to the plan.

        Args:
            step: optimizer steps done.
            probed: loads of the probe.
            losses: held-out loss by name.
        """
        names = self.plan.names
        loads = probed or Loads(self._counts, self._mass)
        has_loads = "loads" in self.strategy.needs
        before = np.array(self.plan.weights)
        signals = Signals(
            step=step,
            round=self.round,
            names=names,
            weights=before,
            initial_weights=self._initial,
            sizes=self._sizes,
            epochs=np.array(self.plan.epochs_used()),
            layers=self.layers,
            counts=loads.counts if has_loads else None,
            mass=loads.mass if has_loads else None,
            train_loss=self._train_loss,
            valid_loss=None
            if losses is None
            else np.array([losses.get(name, np.nan) for name in names]),
            seed=self._seed,
        )
        after = self.strategy.update(signals)
        effective = self.plan.schedule(after.tolist(), self.plan.step, f"round {self.round}")
        update = Update(
            step=step,
            effective=effective,
            before=dict(zip(names, before.tolist(), strict=True)),
            after=dict(zip(names, after.tolist(), strict=True)),
            loads=self._shares(loads.counts) if has_loads else {},
            report=self.strategy.report(),
        )
        self.round += 1
        self._start_afresh()
        return update

    def _start_afresh(self) -> None:
        """New arrays: a strategy may keep those it was given."""
        self._counts, self._mass = np.zeros(self._shape, np.int64), np.zeros(self._shape)
        self._train_loss = np.zeros((*self._shape[:2], 2))

    def _shares(self, counts: NDArray[np.int64]) -> dict[str, list[float]]:
        picks = counts.sum(0)[:, list(self.layers)].astype(np.float64)
        shares = (picks / np.maximum(picks.sum(2, keepdims=True), 1)).mean(1)
        return dict(zip(self.plan.names, shares.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on, beside the plan, for JSON."""
        state: dict[str, Any] = {
            "round": self.round,
            "name": self.name,
            "strategy": self.strategy.state_dict(),
        }
        if self.strategy.changes:
            state["train_loss"] = self._train_loss.tolist()
            if not self._probes:
                state |= {"counts": self._counts.tolist(), "mass": self._mass.tolist()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any grid.

        A resumed run may take another strategy, which then starts without a memory.
        """
        self.round = state["round"]
        if state["name"] == self.name:
            self.strategy.load_state_dict(state["strategy"])
        if not self.strategy.changes:
            return
        for kept, name in (
            (self._train_loss, "train_loss"),
            (self._counts, "counts"),
            (self._mass, "mass"),
        ):
            if name in state and np.shape(state[name]) == kept.shape:
                kept[:] = state[name]


def choose_layers(chosen: str, model: ModelConfig) -> tuple[int, ...]:
    """`last`, `all`, or layer numbers (from 0) separated by commas, as MoE layers of the model.

    Raises:
        UserError: a layer that is not a MoE layer.
    """
    known = model.moe_layers
    if chosen == "all" or not known:
        return tuple(known)
    if chosen == "last":
        return (known[-1],)
    try:
        layers = sorted({int(part) for part in chosen.split(",")})
    except ValueError:
        layers = [-1]
    wrong = [layer for layer in layers if layer not in known]
    if wrong:
        raise UserError(
            f"mixing.layers={chosen}: the MoE layers are {known[0]} to {known[-1]}",
            "give last, all, or numbers of MoE layers separated by commas",
        )
    return tuple(layers)
