"""Expansion against float64 references written from the papers' formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.construction import expansion
from megatron_ext.construction.expansion import (
    Child,
    Merge,
    Selection,
    dissimilarity,
    gram,
    plan_expansion,
    ties,
    trim,
    with_child,
)
from megatron_ext.errors import UserError

KEY = (7, 2, 5, 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_dare(delta: Tensor, drop: float, slot: int) -> Tensor:
    sequence = np.random.SeedSequence((KEY[0], 3, *KEY[1:], slot, 1))
    drawn = np.random.Generator(np.random.Philox(sequence)).random(delta.shape, np.float32)
    found = torch.zeros_like(delta)
    for place in np.ndindex(*delta.shape):
        if drawn[place] >= drop:
            found[place] = delta[place] / (1 - drop)
    return found


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_dare_drops_and_rescales_each_weighted_delta_or_their_sum(
    drop: float, scale: float
) -> None:
    first, second = random(12, 9, seed=1), random(12, 9, seed=2)
    one, two = first.double() * 0.3 * scale, second.double() * 0.7 * scale
    expected = {
        "each": plain_dare(one, drop, 0) + plain_dare(two, drop, 1),
        "sum": plain_dare(one + two, drop, 0),
    }
    for mask in ("each", "sum"):
        merge = Merge("dare", drop, mask=mask, scale=scale)
        found = merge.apply([first, second], (0.3, 0.7), KEY)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("mask", ["each", "sum"])
def test_dare_keeps_the_expectation_and_adds_the_variance_it_says(drop: float, mask: Any) -> None:
    """Of alpha d_j + beta d_k, over as many entries of equal value."""
    n, (alpha, beta), (d_j, d_k) = 400_000, (0.25, 0.75), (2.0, -1.5)
    deltas = [torch.full((n,), d_j), torch.full((n,), d_k)]
    found = Merge("dare", drop, mask=mask).apply(deltas, (alpha, beta), KEY).double()
    one, two = alpha * d_j, beta * d_k
    ratio = drop / (1 - drop)
    variance = ratio * ((one + two) ** 2 if mask == "sum" else one**2 + two**2)
    assert abs(float(found.mean()) - (one + two)) < 5 * math.sqrt(variance / n)
    assert float(found.var()) == pytest.approx(variance, rel=0.03)


def plain_ties(deltas: Sequence[Tensor], weights: Sequence[float], share: float) -> Tensor:
    flat = [delta.double().flatten().tolist() for delta in deltas]
    kept = []
    for values in flat:
        largest = sorted(range(len(values)), key=lambda i, v=values: -abs(v[i]))
        chosen = set(largest[: max(1, round(share * len(values)))])
        kept.append([value if i in chosen else 0.0 for i, value in enumerate(values)])
    merged = []
    for entries in zip(*kept, strict=True):
        sign = 1 if sum(w * e for w, e in zip(weights, entries, strict=True)) >= 0 else -1
        agreeing = [(w, e) for w, e in zip(weights, entries, strict=True) if e * sign > 0]
        total = sum(w for w, _ in agreeing)
        merged.append(sum(w * e for w, e in agreeing) / total if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(deltas[0].shape)


@pytest.mark.parametrize("share", [1e-6, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.9)])
def test_ties_trims_elects_and_averages(share: float, weights: tuple[float, float]) -> None:
    deltas = [random(11, 13, seed=1), random(11, 13, seed=2)]
    expected = plain_ties(deltas, weights, share)
    found = ties(deltas, weights, share)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    merged = Merge("ties", share=share, scale=2.0).apply(deltas, weights, KEY)
    torch.testing.assert_close(merged.double(), 2 * expected, rtol=1e-5, atol=1e-6)


def test_ties_where_entries_are_zero_or_cancel() -> None:
    first, second = torch.tensor([0.0, 1.0, 2.0, -3.0]), torch.tensor([0.0, -1.0, 4.0, 0.0])
    assert ties([first, second], (0.5, 0.5), 1.0).tolist() == [0.0, 1.0, 3.0, -3.0]
    assert trim(torch.tensor([1.0, -5.0, 2.0, 0.0]), 0.5).tolist() == [0.0, -5.0, 2.0, 0.0]
    assert trim(torch.zeros(4), 0.5).tolist() == [0.0] * 4


def test_average_and_task_arithmetic() -> None:
    first, second = random(8, 5, seed=1), random(8, 5, seed=2)
    a, b = first.double(), second.double()
    for merge, expected in (
        (Merge("average"), (a + b) / 2),
        (Merge("task_arithmetic", scale=0.8), 0.8 * (0.3 * a + 0.7 * b)),
    ):
        found = merge.apply([first, second], (0.3, 0.7), KEY).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_masks_depend_on_the_key_alone() -> None:
    deltas = [random(20, 30, seed=1), random(20, 30, seed=2)]
    merge = Merge()
    first = merge.apply(deltas, (0.4, 0.6), KEY)
    for place in range(4):
        key = tuple(number + (n == place) for n, number in enumerate(KEY))
        assert not torch.equal(merge.apply(deltas, (0.4, 0.6), key), first)
    assert torch.equal(merge.apply(deltas, (0.4, 0.6), KEY), first)


def test_gram_matrices_add_up_over_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "_BLOCK", 7)
    base = [random(6, 5), random(4, 3)]
    models = [[random(6, 5, seed=s), random(4, 3, seed=s + 9)] for s in (1, 2, 3)]
    total = sum(gram(base[part], [model[part] for model in models]) for part in (0, 1))
    origin = torch.cat([tensor.double().flatten() for tensor in base])
    flat = torch.stack([torch.cat([t.double().flatten() for t in m]) - origin for m in models])
    assert isinstance(total, Tensor) and total.dtype == torch.float64
    torch.testing.assert_close(total, flat @ flat.T, rtol=1e-12, atol=1e-12)


def test_dissimilarity_is_cosine_or_squared_distance() -> None:
    deltas = random(4, 50).double()
    deltas[3] = 0  # a checkpoint that is the base
    matrix = deltas @ deltas.T
    cosine = dissimilarity(matrix, "cosine")
    for i in range(3):
        for j in range(3):
            expected = 1 - torch.cosine_similarity(deltas[i], deltas[j], dim=0)
            assert float(cosine[i, j]) == pytest.approx(float(expected), abs=1e-8)
    assert cosine[3].tolist() == [1, 1, 1, 0]
    distances = torch.cdist(deltas, deltas).square() / matrix.diagonal().max()
    torch.testing.assert_close(dissimilarity(matrix, "l2"), distances, rtol=0, atol=1e-6)
    for measure in ("cosine", "l2"):
        assert not dissimilarity(torch.zeros(3, 3, dtype=torch.float64), measure).any()


def checkpoints_gram(m: int = 4) -> Tensor:
    """Deltas along a path, as those of a run: the first and the last are furthest apart."""
    steps = random(m, 200).double().cumsum(0)
    return steps @ steps.T


def test_parents_are_the_least_alike_and_pairs_take_turns() -> None:
    matrix = checkpoints_gram()
    apart = dissimilarity(matrix, "cosine")
    order = sorted(
        ((i, j) for i in range(4) for j in range(i + 1, 4)), key=lambda pair: -float(apart[pair])
    )
    alone = Selection()
    children = plan_expansion(4, 14, 3, alone, Merge(), matrix)
    assert [child.parents for child in children] == order + order[:4]
    assert children[0].parents == (0, 3)
    again = plan_expansion(4, 9, 3, dataclasses.replace(alone, repeat_pairs=True), Merge(), matrix)
    assert [child.parents for child in again] == [order[0]] * 5
    assert [child.alpha for child in again] == [child.alpha for child in children[:5]]
    assert len({child.alpha for child in children}) == 10
    assert all(sum(c.weights) == pytest.approx(1) and 0 < c.alpha < 1 for c in children)


def test_a_larger_plan_begins_like_a_smaller_one() -> None:
    options: list[dict[str, Any]] = [{}, {"parents": "random"}, {"measure": "l2"}]
    options += [option | {"child_joins": True} for option in options]
    for selection in (Selection(**option) for option in options):
        plans = [plan_expansion(4, n, 3, selection, Merge(), checkpoints_gram()) for n in (4, 6, 9)]
        assert [len(plan) for plan in plans] == [0, 2, 5]
        assert plans[2][:2] == plans[1]
        other = plan_expansion(4, 9, 4, selection, Merge(), checkpoints_gram())
        assert other != plans[2]
        assert plan_expansion(4, 9, 3, selection, Merge(), checkpoints_gram(), 1) != plans[2]
        pairs = [child.parents for child in plans[2]]
        assert len(set(pairs)) == 5 and all(j < k < 4 + n for n, (j, k) in enumerate(pairs))


def test_random_parents_are_any() -> None:
    selection = Selection(parents="random", repeat_pairs=True)
    children = plan_expansion(3, 303, 0, selection, Merge())
    counts = [sum(c.parents == pair for c in children) for pair in ((0, 1), (0, 2), (1, 2))]
    assert sum(counts) == 300 and min(counts) > 70
    joined = plan_expansion(2, 40, 0, dataclasses.replace(selection, child_joins=True), Merge())
    assert max(max(child.parents) for child in joined) > 20


def test_alpha_is_as_concentrated_as_asked() -> None:
    for a in (0.5, 1.0, 20.0):
        selection = Selection("random", repeat_pairs=True, concentration=a)
        alphas = np.array([c.alpha for c in plan_expansion(2, 2002, 1, selection, Merge())])
        assert alphas.mean() == pytest.approx(0.5, abs=0.04)
        assert alphas.var() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.15)  # of Beta(a, a)
    average = plan_expansion(2, 4, 1, Selection("random"), Merge("average"))
    assert [child.alpha for child in average] == [0.5, 0.5]


MERGES = [
    Merge("average"),
    Merge("task_arithmetic", scale=0.7),
    Merge("dare", 0.5),
    Merge("dare", 0.9, scale=0.7),
    Merge("dare", 0.5, mask="sum"),
]


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_a_childs_similarity_is_known_before_it_is_made(merge: Merge) -> None:
    """A grandchild's too: exactly for linear merges, for DARE as the mean of many entries."""
    n = 400_000
    common = random(n)
    deltas = [common + random(n, seed=s) * s for s in (1, 2, 3)]
    matrix = gram(torch.zeros(n), deltas)
    for number, child in enumerate((Child((0, 2), 0.3), Child((1, 3), 0.6))):
        matrix = with_child(matrix, child, merge)
        chosen = [deltas[parent] for parent in child.parents]
        deltas.append(merge.apply(chosen, child.weights, (1, number, 0, 1)))
    rtol = 0.1 if merge.method == "dare" else 1e-5
    torch.testing.assert_close(matrix, gram(torch.zeros(n), deltas), rtol=rtol, atol=0)


MISTAKES: list[tuple[int, int, Selection, Merge, str]] = [
    (1, 4, Selection(), Merge(), "there is only 1"),
    (4, 3, Selection(), Merge(), "num_experts=3 is less than the 4 checkpoints"),
    (2, 3, Selection(concentration=0), Merge(), "alpha_concentration=0 must be above 0"),
    (2, 3, Selection(), Merge(drop=1.0), "dare_drop=1.0"),
    (2, 3, Selection(), Merge(drop=-0.1), "dare_drop=-0.1"),
    (2, 3, Selection(), Merge("ties", share=0), "ties_share=0"),
    (2, 3, Selection(), Merge(scale=math.nan), "merge_scale=nan"),
    (2, 3, Selection(child_joins=True), Merge("ties"), "similar a child of merge=ties"),
]


@pytest.mark.parametrize(("m", "n", "selection", "merge", "message"), MISTAKES)
def test_impossible_plans_are_refused(
    m: int, n: int, selection: Selection, merge: Merge, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_expansion(m, n, 0, selection, merge, torch.eye(m, dtype=torch.float64))


def test_ties_is_planned_where_children_are_no_parents() -> None:
    matrix = checkpoints_gram()
    assert plan_expansion(4, 6, 0, Selection(), Merge("ties"), matrix)
    assert plan_expansion(4, 6, 0, Selection(parents="random", child_joins=True), Merge("ties"))
