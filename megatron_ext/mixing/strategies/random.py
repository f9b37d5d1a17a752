"""Weights drawn anew at every update (MoE-SFT's baseline)."""

import numpy as np

from megatron_ext.mixing.strategies.base import Floats, Signals, Strategy, normalise

# Apart from the streams of the seed that order the slots of a batch (keyed by step).
_STREAM = 2**63


class Random(Strategy):
    """w ~ U(0, 1) for each data set, normalised. The same for the same seed and update."""

    def update(self, signals: Signals) -> Floats:
        # Raw words of Philox: numpy guarantees these across its versions.
        # An array: of a list with numbers above 2**63 numpy would make floats.
        key = np.array([signals.seed, _STREAM + signals.round], np.uint64)
        generator = np.random.Philox(key=key)
        words = generator.random_raw(len(signals.weights)) >> np.uint64(11)
        uniform = (words.astype(np.float64) + 0.5) / 2**53
        return normalise(np.where(signals.weights > 0, uniform, 0.0))
