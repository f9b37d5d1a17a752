"""Experts of neurons that are active together: a balanced cut of their co-activation graph.

MoEfication (Zhang et al. 2022, arXiv 2110.01786, section 3.2) as LLaMA-MoE's code has it for
SwiGLU. LLaMA-MoE's authors do not recommend it. METIS cuts the graph; it needs memory for d_h^2
edges several times over: some 10 GiB at d_h = 11008.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

BATCH = 16
"""Tokens over which products are summed before they are clamped: with 64, nearly all edges of a
small LLaMA are at the clamp and tell nothing apart."""
THRESHOLD = 0.99
"""An edge weighs how often it holds this part of the first decile that is not 0."""


def co_activation(gate: Tensor, up: Tensor, inputs: Tensor, num_experts: int, seed: int) -> Tensor:
    """Neuron map of equal parts with few strong edges between them.

    Args:
        gate, up: [d_h, h] weights of the dense FFN.
        inputs: [n, h] what the FFN sees, of sampled tokens.
        num_experts: E, a divisor of d_h.
        seed: of METIS.

    Returns:
        [E, d_h / E], ascending within an expert.

    Raises:
        UserError: pymetis is not installed, or no two neurons are active together.
    """
    edges = edge_weights(adjacency(gate, up, inputs))
    labels = cut(edges, num_experts, seed)
    labels = rebalance(edges, labels, num_experts)
    return torch.from_numpy(np.argsort(labels, kind="stable").reshape(num_experts, -1))


def adjacency(gate: Tensor, up: Tensor, inputs: Tensor, batch: int = BATCH) -> np.ndarray:
    """Co-activation [d_h, d_h] fp32: the sum over batches of min(1, sum over tokens |h_i| |h_j|).

    Args:
        gate, up: [d_h, h]
        inputs: [n, h]
        batch: tokens in a batch.
    """
    gate, up = gate.to(torch.float32), up.to(torch.float32)
    total = torch.zeros(len(gate), len(gate))
    for x in inputs.to(torch.float32).split(batch):
        hidden = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs()
        total += (hidden.T @ hidden).clamp_(max=1)
    return total.numpy()


def edge_weights(adjacency: np.ndarray) -> np.ndarray:
    """Whole weights [d_h, d_h] int32 of the graph, 0 where there is no edge and on the diagonal.

    An edge weighs its co-activation over 0.99 times the first decile (10 %, 20 %, ...) of all that
    is not 0, rounded down.

    Raises:
        UserError: every decile is 0.
    """
    deciles = np.percentile(adjacency, range(10, 101, 10))
    positive = deciles[deciles > 0]
    if not len(positive):
        raise UserError(
            "no two neurons are active together", "collect statistics of more text, or other text"
        )
    weights = (adjacency / np.float32(THRESHOLD * positive[0])).clip(max=2**20).astype(np.int32)
    np.fill_diagonal(weights, 0)
    return weights


def cut(weights: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """METIS's labels [d_h] for a graph [d_h, d_h]; the parts' sizes may differ by a few percent."""
    try:
        import pymetis
    except ImportError:
        raise UserError("co_activation needs pymetis", "pip install pymetis") from None
    sources, targets = np.nonzero(weights)
    starts = np.concatenate([[0], np.bincount(sources, minlength=len(weights)).cumsum()])
    graph = pymetis.CSRAdjacency(starts, targets)
    strengths = weights[sources, targets].astype(np.int64)
    options = pymetis.Options(seed=seed)
    _, labels = pymetis.part_graph(parts, graph, eweights=strengths, options=options)
    return np.asarray(labels)


def rebalance(weights: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """Labels with parts of exactly the same size, by as few moves as it takes.

    Each time the neuron moves that loses least: from a part that is too large to one that is too
    small, by the edges to either. (LLaMA-MoE moves neurons at random.)

    Args:
        weights: [d_h, d_h] symmetric
        labels: [d_h]
        parts: a divisor of d_h.
    """
    labels = labels.copy()
    size = len(labels) // parts
    ties = weights.astype(np.float32) @ np.eye(parts, dtype=np.float32)[labels]  # [d_h, parts]
    sizes = np.bincount(labels, minlength=parts)
    while (sizes != size).any():
        gains = ties - ties[np.arange(len(labels)), labels][:, None]
        gains[sizes[labels] <= size] = -np.inf
        gains[:, sizes >= size] = -np.inf
        neuron, target = np.unravel_index(gains.argmax(), gains.shape)
        source = labels[neuron]
        ties[:, source] -= weights[:, neuron]
        ties[:, target] += weights[:, neuron]
        sizes[source] -= 1
        sizes[target] += 1
        labels[neuron] = target
    return labels
