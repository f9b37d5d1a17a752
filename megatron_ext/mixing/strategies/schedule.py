"""Weights fixed in advance: written in the recipe, or taken from the log of another run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies.base import Floats, Signals, Strategy
from megatron_ext.mixing.strategies.weights_log import read_entry, read_log


class Schedule(Strategy):
    """Weights by step. They take effect at exactly these steps: the blend knows them beforehand.

    Args:
        names: the data sets of the run.
        schedule: a list of {step, weights}, steps ascending, weights by name or in the recipe's
            order and of any scale. Before the first step the initial weights are in force.
        log: instead, the weights log (JSON Lines) of a run over the same data sets.

    Raises:
        UserError: neither or both, or an entry that does not fit.
    """

    changes = False

    def __init__(
        self,
        names: Sequence[str],
        *,
        schedule: list[dict[str, Any]] | None = None,
        log: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(names, **options)
        if (schedule is None) == (log is None):
            raise UserError(
                "mixing strategy schedule takes its weights from one of two places",
                "give either the option schedule (a list of {step, weights}) or log (a file)",
            )
        if log is not None:
            self._entries = read_log(Path(log), self.names)
            return
        if not isinstance(schedule, list) or not schedule:
            raise UserError("mixing option schedule is not a list of {step, weights}")
        self._entries = [
            read_entry(entry, f"schedule[{i}]", self.names) for i, entry in enumerate(schedule)
        ]
        steps = [entry["step"] for entry in self._entries]
        if steps != sorted(set(steps)):
            raise UserError(f"the steps of mixing option schedule are {steps}", "let them ascend")

    def initial(self, weights: Any, sizes: Any) -> Floats:
        start = super().initial(weights, sizes)
        if self._entries[0]["step"] > 0:
            return start
        return super().initial(self._entries[0]["weights"], sizes)

    def update(self, signals: Signals) -> Floats:
        return signals.weights

    def weights_log(self, initial: Floats) -> list[dict[str, Any]]:
        entries = [dict(entry) for entry in self._entries]
        if entries[0]["step"] > 0:
            first = {"step": 0, "weights": initial.tolist()}
            entries.insert(0, first | {"reason": "initial", "automatic": False})
        return entries
