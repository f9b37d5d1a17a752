"""How far data sets are from each other, and static weights in proportion to it.

n data sets, L layers, k shares of experts or numbers of an embedding.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_ext.mixing.strategies.base import Floats, normalise


def l2_distances(features: Floats) -> Floats:
    """Euclidean distances [n, n] of features [n, L, k], mean over layers."""
    return np.array([np.sqrt(((features - own) ** 2).sum(-1)).mean(-1) for own in features])


def distance_weights(features: ArrayLike) -> Floats:
    """w_i in proportion to Delta_i = sum_j |x_i - x_j| / n, the distance of MoE-SFT's algorithm 1.

    MoE-SFT's static baselines are made of distances of sentence embeddings and of gate loads; how,
    it does not say. In proportion its published loads give .26 .31 .23 .21, and its weights are
    .25 .32 .23 .21. Nothing has to be chosen, and the scale of the features does not matter.

    Args:
        features: [n, k] or [n, L, k].

    Returns:
        Weights [n] that add up to 1; equal where no data set is apart from another.
    """
    given = np.asarray(features, np.float64)
    delta = l2_distances(given if given.ndim == 3 else given[:, None]).mean(-1)
    return normalise(delta if delta.any() else np.ones_like(delta))
