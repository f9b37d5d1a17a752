"""Weights that stay as they are."""

from megatron_ext.mixing.strategies.base import Floats, Signals, Strategy


class Static(Strategy):
    """The initial weights for the whole run."""

    changes = False

    def update(self, signals: Signals) -> Floats:
        return signals.weights
