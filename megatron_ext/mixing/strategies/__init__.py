"""Mixing strategies: blend weights from router loads, losses or nothing at all.

One small file each, pure float64 functions of the signals, on numpy alone. `docs/mixing.md` says
what each does and how to write another.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import published
from megatron_ext.mixing.strategies.base import Signals, Strategy, allowed_options

__all__ = ["STRATEGIES", "Signals", "Strategy", "make_strategy"]

_HERE = "megatron_ext.mixing.strategies"
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # The name of a mixture is short for static with that mixture as its initial weights.
    **{name: ("static", {"initial": name}) for name in ("uniform", "data_size")},
    **{name: ("static", {"initial": name}) for name in published.MIXTURES},
    "inverse": ("router_load", {"distance": "inverse"}),
}
"""Names that are short for a strategy with options."""

STRATEGIES: dict[str, str] = {
    "static": f"{_HERE}.static:Static",
    "random": f"{_HERE}.random:Random",
    "sequential": f"{_HERE}.sequential:Sequential",
    "schedule": f"{_HERE}.schedule:Schedule",
    "reference_loss": f"{_HERE}.reference_loss:ReferenceLoss",
    "router_load": f"{_HERE}.router_load:RouterLoad",
    "load_progress": f"{_HERE}.load_progress:LoadProgress",
}
"""Built-in strategies as "module:Class"."""
STRATEGIES |= {name: STRATEGIES[of] for name, (of, _) in _PRESETS.items()}


def make_strategy(
    name: str, names: Sequence[str], options: dict[str, Any] | None = None
) -> Strategy:
    """The strategy of a recipe.

    Args:
        name: a key of STRATEGIES, or "package.module:Class" for a subclass of Strategy.
        names: the data sets of the run.
        options: for its constructor.

    Raises:
        UserError: an unknown name, or options that are unknown or do not fit.
    """
    cls = _find(name)
    _, preset = _PRESETS.get(name, (name, {}))
    allowed = [option for option in allowed_options(cls) if option not in preset]
    for option in options or {}:
        if option not in allowed:
            raise UserError(
                f"mixing strategy {name} has no option '{option}'",
                f"it takes {', '.join(allowed) or 'none'}",
            )
    return cls(names, **preset, **(options or {}))


def _find(name: str) -> type[Strategy]:
    place = STRATEGIES.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        # Not at the top: the recipe's reader imports the configuration, which may import this.
        from megatron_ext.recipe import nearest

        raise UserError(
            f"unknown mixing strategy '{name}'",
            nearest(name, STRATEGIES) + ' (or "package.module:Class" of your own)',
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"mixing strategy '{name}' cannot be imported: {error}",
            "its module must be importable where training starts (PYTHONPATH)",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise UserError(f"mixing strategy '{name}' is not a subclass of Strategy")
    return cls
