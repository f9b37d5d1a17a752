"""Signals for strategies, with figures of a real model."""

from typing import Any

import numpy as np

from megatron_ext.mixing.strategies import Signals, Strategy
from megatron_ext.mixing.strategies.base import Floats

SFT = ("code", "math", "orca", "sharegpt")

# Loads of LLaMA-MoE's last layer on MoE-SFT's data sets: figures in that paper's repository, there
# as shares of these whole numbers.
LLAMA_MOE = """
15042 14050 13562 11785 13075 13456 13713 12517
27301 18352 19435 19587 19922 20096 23255 22666
39872 31155 32597 34008 29942 36524 30969 28877
126594 93186 105889 99242 94050 111451 100982 88514"""


def loads(text: str) -> np.ndarray:
    """[4, E]"""
    return np.array(text.split(), np.int64).reshape(4, -1)


def signals(weights: Any, counts: np.ndarray | None = None, **values: Any) -> Signals:
    """Counts [F, D, L, E]; or [D, E], of layer 1 of 2, which two folds then share."""
    weights = np.asarray(weights, np.float64)
    if counts is not None and counts.ndim == 2:
        other, third = np.ones_like(counts), counts // 3
        folds = np.stack([other, third], 1), np.stack([other, counts - third], 1)
        counts = np.stack(folds)
    given: dict[str, Any] = {
        "step": 100,
        "round": 0,
        "names": tuple(f"d{i}" for i in range(len(weights))),
        "weights": weights,
        "initial_weights": weights,
        "sizes": np.full(len(weights), 10**6),
        "epochs": np.zeros(len(weights)),
        "layers": (1,),
        "counts": counts,
        "mass": None,
        "train_loss": None,
        "valid_loss": None,
        "seed": 7,
    }
    return Signals(**(given | values))


def iterate(strategy: Strategy, weights: Any, rounds: int, **values: Any) -> dict[int, Floats]:
    """Weights after each of some updates with the same signals."""
    history = {}
    for number in range(rounds):
        weights = strategy.update(signals(weights, round=number, **values))
        history[number + 1] = weights
    return history
