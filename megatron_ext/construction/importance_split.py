"""Experts chosen by importance: which neurons matter to which group of the data.

Importance is an array [E, d_h], a row for each group of the data, and group e becomes expert e
(LLaMA-MoE, arXiv 2406.16554, section 3; LLaMA-MoE v2, arXiv 2411.15708). Neurons of equal
importance are taken in ascending order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError


def greedy(importance: np.ndarray, width: int, free: np.ndarray | None = None) -> Tensor:
    """Disjoint experts ("gradient", neuron-independent): the global greedy choice.

    Again and again the largest importance of all pairs of an expert that is not full and a neuron
    that is not taken. A pair that cannot be taken never can be later, so this is one walk through
    the pairs in falling order. Ties go to the later expert, then to the lower neuron.

    Args:
        importance: [E, d_h]
        width: neurons m of an expert; E * m are taken.
        free: [d_h] bool, neurons that may be taken; none: all.

    Returns:
        [E, m], ascending within an expert.

    Raises:
        UserError: fewer than E * m neurons are free, or an importance is not finite.
    """
    importance = _checked(importance)
    num_experts, d_ffn = importance.shape
    available = np.ones(d_ffn, dtype=bool) if free is None else free
    if num_experts * width > available.sum():
        raise UserError(
            f"{num_experts} disjoint experts of {width} neurons need {num_experts * width}, "
            f"there are {available.sum()}"
        )
    # A stable sort keeps the order of the pairs: the later experts are put first.
    order = np.argsort(-importance[::-1].reshape(-1), kind="stable")
    experts, neurons = num_experts - 1 - order // d_ffn, order % d_ffn
    taken = (~available).tolist()
    chosen: list[list[int]] = [[] for _ in range(num_experts)]
    missing = num_experts * width
    for expert, neuron in zip(experts.tolist(), neurons.tolist(), strict=True):
        if taken[neuron] or len(chosen[expert]) == width:
            continue
        chosen[expert].append(neuron)
        taken[neuron] = True
        missing -= 1
        if not missing:
            break
    return torch.tensor(chosen).sort(dim=1).values


def top(importance: np.ndarray, width: int, free: np.ndarray | None = None) -> Tensor:
    """Overlapping experts ("Sharing-Inner"): each its own `width` most important neurons.

    Args:
        importance: [E, d_h]
        width: neurons m of an expert.
        free: [d_h] bool, neurons that may be taken; none: all.

    Returns:
        [E, m], ascending within an expert.

    Raises:
        UserError: fewer than m neurons are free, or an importance is not finite.
    """
    importance = _checked(importance)
    available = np.ones(importance.shape[1], dtype=bool) if free is None else free
    if width > available.sum():
        raise UserError(f"experts of {width} neurons cannot be made of {available.sum()}")
    chosen = _top(_falling(importance), available, width)
    return torch.from_numpy(np.sort(chosen, axis=1))


def shared_neurons(importance: np.ndarray, width: int, count: int) -> Tensor:
    """Neurons of the residual expert ("Sharing-Inter"): those that most experts ask for.

    Every expert lists its `width` most important neurons that are left; those in the largest
    number of lists are taken, in ascending order; and so on until there are enough.

    Args:
        importance: [E, d_h]
        width: neurons m that an expert asks for.
        count: neurons to take.

    Returns:
        [count], ascending.

    Raises:
        UserError: fewer than `count` neurons, or an importance is not finite.
    """
    importance = _checked(importance)
    d_ffn = importance.shape[1]
    if count > d_ffn:
        raise UserError(f"{count} residual neurons cannot be taken out of {d_ffn}")
    order = _falling(importance)
    available = np.ones(d_ffn, dtype=bool)
    while (missing := count - (d_ffn - available.sum())) > 0:
        asked = _top(order, available, min(width, available.sum()))
        votes = np.bincount(asked.reshape(-1), minlength=d_ffn)
        available[np.flatnonzero(votes == votes.max())[:missing]] = False
    return torch.from_numpy(np.flatnonzero(~available))


def _falling(importance: np.ndarray) -> np.ndarray:
    """[E, d_h] neurons of every expert, the most important first."""
    return np.argsort(-importance, axis=1, kind="stable")


def _top(order: np.ndarray, available: np.ndarray, width: int) -> np.ndarray:
    """[E, width]: the first available neurons of every row of `order`."""
    usable = available[order]
    first = usable & (usable.cumsum(axis=1) <= width)
    return order[first].reshape(len(order), width)


def _checked(importance: np.ndarray) -> np.ndarray:
    importance = np.asarray(importance, dtype=np.float64)
    if not np.isfinite(importance).all():
        raise UserError("importance holds values that are NaN or infinite", "collect it again")
    return importance
