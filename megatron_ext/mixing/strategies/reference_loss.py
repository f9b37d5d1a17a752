"""Weights that follow how far each loss is above a reference (LLM-Shearing, LLaMA-MoE)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import published
from megatron_ext.mixing.strategies.base import (
    Floats,
    Signals,
    Strategy,
    choice,
    exponentiated,
    jsonable,
    number,
    whole,
)


class ReferenceLoss(Strategy):
    """alpha = softmax(log w + eta * (L - L_ref)); w' = (1 - c) * alpha + c / n.

    LLM-Shearing's dynamic batch loading, whose paper clips the difference at 0 (section 3.2), while
    its code and LLaMA-MoE do not. LLaMA-MoE's `sheared_llama_paper`: clipped, c = 0. A data set
    whose loss is not known keeps its share.

    Args:
        names: the data sets of the run.
        references: loss in nats per token by data set, or the name of published ones. Where there
            are none, training makes a run with uniform weights first (training/reference.py).
        reference_iters: steps of that run; none: as many as of the run itself.
        eta: step size.
        c: share that is spread evenly.
        clipped: whether a loss below its reference counts as reached.
        loss: `valid`, the held-out loss, or `train`, the mean since the last update.

    Raises:
        UserError: options that do not fit.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        references: Mapping[str, float] | str | None = None,
        reference_iters: int | None = None,
        eta: float = 1.0,
        c: float = 1e-4,
        clipped: bool = False,
        loss: str = "valid",
        **options: Any,
    ) -> None:
        super().__init__(names, **options)
        self.references = np.array(self._references(references))
        if reference_iters is not None:
            whole("reference_iters", reference_iters, 1)
        self.eta = number("eta", eta, 0)
        self.c = number("c", c, 0, 1)
        if not isinstance(clipped, bool):
            raise UserError(f"mixing option clipped={clipped!r}", "give true or false")
        self.clipped = clipped
        self.loss = choice("loss", loss, ("valid", "train"))
        self.needs = frozenset({f"{self.loss}_loss"})
        self._report: dict[str, Any] = {}

    def update(self, signals: Signals) -> Floats:
        if self.loss == "valid":
            assert signals.valid_loss is not None
            losses = signals.valid_loss
        else:
            assert signals.train_loss is not None
            total, tokens = np.moveaxis(signals.train_loss.sum(0), -1, 0)
            losses = np.where(tokens > 0, total / np.maximum(tokens, 1), np.nan)
        excess = losses - self.references
        if self.clipped:
            excess = np.maximum(excess, 0.0)
        self._report = {"loss": jsonable(losses), "excess_loss": jsonable(excess)}
        return exponentiated(signals.weights, excess, self.eta, self.c)

    def report(self) -> dict[str, Any]:
        return self._report

    def _references(self, given: Mapping[str, float] | str | None) -> list[float]:
        if isinstance(given, str):
            row = choice("references", given, tuple(published.REFERENCE_LOSSES))
            return published.lookup(row, published.REFERENCE_LOSSES, self.names)
        if not isinstance(given, Mapping) or set(given) != set(self.names):
            raise UserError(
                "mixing option references has "
                + (
                    f"losses for {', '.join(given)}" if isinstance(given, Mapping) else f"{given!r}"
                ),
                f"give a loss for each of {', '.join(self.names)}, or one of "
                + ", ".join(published.REFERENCE_LOSSES),
            )
        return [number(f"references.{name}", given[name]) for name in self.names]
