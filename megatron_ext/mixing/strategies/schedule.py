"""Weights fixed in advance: written in the recipe, or taken from the log of another run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies.base import Floats, Signals, Strategy, number, whole


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
            self._entries = self._logged(Path(log))
            return
        if not isinstance(schedule, list) or not schedule:
            raise UserError("mixing option schedule is not a list of {step, weights}")
        self._entries = [self._entry(e, f"schedule[{i}]") for i, e in enumerate(schedule)]
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

    def _entry(self, entry: Any, where: str) -> dict[str, Any]:
        if not isinstance(entry, dict) or not {"step", "weights"} <= set(entry):
            raise UserError(f"{where} is not {{step, weights}}: {str(entry)[:80]}")
        weights = entry["weights"]
        if isinstance(weights, dict):
            if set(weights) != set(self.names):
                raise UserError(
                    f"{where} has weights for {', '.join(weights)}",
                    f"give one for each of {', '.join(self.names)}",
                )
            weights = [weights[name] for name in self.names]
        if not isinstance(weights, list) or len(weights) != len(self.names):
            raise UserError(
                f"{where}: weights {weights!r}", f"one for each of {', '.join(self.names)}"
            )
        return {
            "step": whole(f"{where}.step", entry["step"], 0),
            "weights": [number(f"{where}.weights", weight, 0) for weight in weights],
            "reason": str(entry.get("reason", "schedule")),
            "automatic": False,
        }

    def _logged(self, path: Path) -> list[dict[str, Any]]:
        """What took effect in a run. What the blend did by itself, it will do again."""
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise UserError(f"weights log {path}: {error.strerror}") from None
        entries: list[dict[str, Any]] = []
        for place, line in enumerate(lines, start=1):
            where = f"{path}, line {place}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: {error}") from None
            if isinstance(values, dict) and values.get("automatic"):
                continue
            entry = self._entry(values, where)
            # A run that was killed and resumed has logged some steps twice: the last time counts.
            entries = [earlier for earlier in entries if earlier["step"] < entry["step"]]
            entries.append(entry)
        if not entries:
            raise UserError(f"weights log {path} has no weights")
        return entries
