"""Weights logs: JSON Lines of {step, weights, reason, automatic}, as runs and tools write them.

A run's blend_weights.jsonl is one, and what tools/static_weights.py writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies.base import number, whole

Entry = dict[str, Any]


def read_entry(entry: Any, where: str, names: Sequence[str]) -> Entry:
    """One entry, with its weights as a list in the order of `names`.

    Raises:
        UserError: it is none, or its weights are not those of `names`.
    """
    if not isinstance(entry, dict) or not {"step", "weights"} <= set(entry):
        raise UserError(f"{where} is not {{step, weights}}: {str(entry)[:80]}")
    weights = entry["weights"]
    if isinstance(weights, dict):
        if set(weights) != set(names):
            raise UserError(
                f"{where} has weights for {', '.join(weights)}",
                f"give one for each of {', '.join(names)}",
            )
        weights = [weights[name] for name in names]
    if not isinstance(weights, list) or len(weights) != len(names):
        raise UserError(f"{where}: weights {weights!r}", f"one for each of {', '.join(names)}")
    return {
        "step": whole(f"{where}.step", entry["step"], 0),
        "weights": [number(f"{where}.weights", weight, 0) for weight in weights],
        "reason": str(entry.get("reason", "schedule")),
        "automatic": False,
    }


def read_log(path: Path, names: Sequence[str]) -> list[Entry]:
    """What took effect in a run, in order. What the blend did by itself is left out.

    Raises:
        UserError: no file, a line that is no entry, or no entry at all.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"weights log {path}: {error.strerror}") from None
    entries: list[Entry] = []
    for place, line in enumerate(lines, start=1):
        where = f"{path}, line {place}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {error}") from None
        if isinstance(values, dict) and values.get("automatic"):
            continue
        entry = read_entry(values, where, names)
        # A run that was killed and resumed has logged some steps twice: the last time counts.
        entries = [earlier for earlier in entries if earlier["step"] < entry["step"]]
        entries.append(entry)
    if not entries:
        raise UserError(f"weights log {path} has no weights")
    return entries
