import sys

import numpy as np
import pytest
import torch

from megatron_ext.construction import coactivation
from megatron_ext.errors import UserError

pytest.importorskip("pymetis")


def ffn_with_groups(groups: int, size: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """Neurons n = g, g + groups, ... read input g alone; and inputs that hold one group each."""
    rows = torch.zeros(groups * size, hidden)
    rows[torch.arange(groups * size), torch.arange(groups * size) % groups] = 3.0
    inputs = torch.zeros(40 * groups, hidden)
    inputs[torch.arange(40 * groups), torch.arange(groups).repeat_interleave(40)] = 1.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, groups * size, hidden, generator=generator) * 0.005
    return rows + noise[0], rows + noise[1], inputs


def test_adjacency_is_the_papers_sum() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    inputs = torch.randn(7, 5, dtype=torch.float64)
    expected, unclamped = np.zeros((12, 12)), np.zeros((12, 12))
    for batch in (range(3), range(3, 6), range(6, 7)):
        products = np.zeros((12, 12))
        for t in batch:
            gated = [float(g @ inputs[t]) for g in gate]
            h = [
                abs(g / (1 + np.exp(-g)) * float(u @ inputs[t]))
                for g, u in zip(gated, up, strict=True)
            ]
            products += np.outer(h, h)
        expected += np.minimum(products, 1)
        unclamped += products
    found = coactivation.adjacency(gate, up, inputs, batch=3)
    assert np.abs(found - expected).max() < 1e-5
    assert 0 < (expected < unclamped).mean() < 1


def test_edges_weigh_multiples_of_the_first_decile() -> None:
    adjacency = np.zeros((10, 10), dtype=np.float32)
    adjacency[0, 1] = adjacency[1, 0] = 5.0
    adjacency[2:, 2:] = 2.0  # 64 of 100 values: the deciles are 0, 0, 0, 2, ...
    adjacency[3, 4] = adjacency[4, 3] = 1.9
    weights = coactivation.edge_weights(adjacency)
    assert weights[0, 1] == 2 and weights[5, 6] == 1 and weights[3, 4] == 0
    assert not weights.diagonal().any() and (weights == weights.T).all()
    with pytest.raises(UserError, match="no two neurons are active together"):
        coactivation.edge_weights(np.zeros((10, 10), dtype=np.float32))


def test_groups_of_neurons_become_experts() -> None:
    gate, up, inputs = ffn_with_groups(4, 12, 6)
    experts = coactivation.co_activation(gate, up, inputs, 4, 0)
    assert experts.shape == (4, 12)
    assert sorted(int(neurons[0]) % 4 for neurons in experts) == [0, 1, 2, 3]
    assert all(len({int(n) % 4 for n in neurons}) == 1 for neurons in experts)


def test_parts_are_made_equal_by_the_cheapest_moves() -> None:
    weights = np.zeros((6, 6), dtype=np.int32)
    for a, b, weight in ((0, 1, 9), (1, 2, 9), (0, 2, 9), (3, 2, 1), (3, 4, 1), (4, 5, 9)):
        weights[a, b] = weights[b, a] = weight
    # Neuron 3 has one tie to either side: it costs nothing to move.
    labels = coactivation.rebalance(weights, np.array([0, 0, 0, 0, 1, 1]), 2)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    labels = coactivation.rebalance(weights, np.zeros(6, dtype=int), 3)
    assert np.bincount(labels).tolist() == [2, 2, 2]


def test_the_same_seed_gives_the_same_experts() -> None:
    torch.manual_seed(0)
    gate, up, inputs = torch.randn(64, 8), torch.randn(64, 8), torch.randn(200, 8)
    one, two = (coactivation.co_activation(gate, up, inputs, 8, 3) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one.reshape(-1).sort().values, torch.arange(64))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(UserError, match="needs pymetis"):
        coactivation.cut(np.ones((4, 4), dtype=np.int32), 2, 0)
