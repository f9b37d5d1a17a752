"""Splits by importance against the papers' words, written as plain loops."""

import numpy as np
import pytest
import torch

from megatron_ext.construction.importance_split import greedy, shared_neurons, top
from megatron_ext.errors import UserError


def importances(num_experts: int, d_ffn: int, seed: int, ties: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).lognormal(size=(num_experts, d_ffn))
    return np.floor(values * 2) if ties else values


def plain_greedy(importance: np.ndarray, width: int, free: set[int]) -> list[list[int]]:
    num_experts, d_ffn = importance.shape
    experts: list[list[int]] = [[] for _ in range(num_experts)]
    free = set(free)
    while any(len(expert) < width for expert in experts):
        best = None
        for e in range(num_experts):
            for n in range(d_ffn):
                if len(experts[e]) < width and n in free:
                    rank = (importance[e, n], e, -n)
                    if best is None or rank > best[0]:
                        best = (rank, e, n)
        assert best is not None
        experts[best[1]].append(best[2])
        free.remove(best[2])
    return [sorted(expert) for expert in experts]


def plain_top(importance: np.ndarray, width: int, free: set[int]) -> list[list[int]]:
    return [
        sorted(sorted(free, key=lambda n: (-values[n], n))[:width])
        for values in importance.tolist()
    ]


def plain_shared(importance: np.ndarray, width: int, count: int) -> list[int]:
    residual: list[int] = []
    while len(residual) < count:
        free = set(range(importance.shape[1])) - set(residual)
        lists = plain_top(importance, width, free)
        votes = {n: sum(n in chosen for chosen in lists) for n in sorted(free)}
        for n, number in votes.items():
            if number == max(votes.values()) and len(residual) < count:
                residual.append(n)
    return sorted(residual)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("experts", "d_ffn", "width"), [(4, 24, 6), (3, 20, 5), (1, 6, 6)])
def test_greedy(experts: int, d_ffn: int, width: int, ties: bool) -> None:
    importance = importances(experts, d_ffn, 1, ties)
    assert greedy(importance, width).tolist() == plain_greedy(importance, width, set(range(d_ffn)))
    free = np.arange(d_ffn) % 7 != 3
    width = int(free.sum()) // experts
    expected = plain_greedy(importance, width, set(np.flatnonzero(free).tolist()))
    assert greedy(importance, width, free).tolist() == expected


def test_equal_importance_goes_to_the_later_expert_and_the_lower_neuron() -> None:
    assert greedy(np.ones((2, 4)), 2).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("ties", [False, True])
def test_top(ties: bool) -> None:
    importance = importances(4, 24, 2, ties)
    assert top(importance, 9).tolist() == plain_top(importance, 9, set(range(24)))
    free = np.arange(24) % 5 != 0
    assert top(importance, 9, free).tolist() == plain_top(
        importance, 9, set(np.flatnonzero(free).tolist())
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("width", "count"), [(3, 3), (3, 9), (6, 12), (4, 24), (24, 5)])
def test_shared_neurons(width: int, count: int, ties: bool) -> None:
    importance = importances(5, 24, 3, ties)
    expected = plain_shared(importance, width, count)
    assert shared_neurons(importance, width, count).tolist() == expected


def test_maps_at_full_size_are_disjoint_and_complete() -> None:
    importance = importances(14, 11008, 4)
    residual = shared_neurons(importance, 688, 2 * 688)
    free = np.ones(11008, dtype=bool)
    free[residual.numpy()] = False
    experts = greedy(importance, 688, free)
    assert experts.shape == (14, 688) and len(residual) == 1376
    everything = torch.cat([experts.reshape(-1), residual]).sort().values
    assert torch.equal(everything, torch.arange(11008))


def test_what_cannot_be_chosen_is_refused() -> None:
    importance = importances(4, 24, 5)
    with pytest.raises(UserError, match="4 disjoint experts of 7 neurons need 28, there are 24"):
        greedy(importance, 7)
    with pytest.raises(UserError, match="experts of 25 neurons cannot be made of 24"):
        top(importance, 25)
    with pytest.raises(UserError, match="25 residual neurons cannot be taken out of 24"):
        shared_neurons(importance, 4, 25)
    importance[2, 3] = np.nan
    for choose in (lambda: greedy(importance, 6), lambda: top(importance, 6)):
        with pytest.raises(UserError, match="NaN"):
            choose()
