"""Upcycling against float64 references written from the papers' formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.construction.merging import merge_experts, merge_weights
from megatron_ext.construction.partition import slice_fc1, slice_fc2
from megatron_ext.construction.upcycling import (
    Alteration,
    Matrix,
    replica_map,
    weight_factors,
)
from megatron_ext.errors import UserError

H, D = 6, 24


def dense_ffn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((D, H), (D, H), (H, D))
    )
    return gate, up, down


def plain_ffn(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    z = gate @ x
    return down @ (z / (1 + torch.exp(-z)) * (up @ x))


def plain_mixture(fc1: Tensor, fc2: Tensor, logits: Tensor, topk: int, x: Tensor) -> Tensor:
    """Top-k, softmax over the chosen logits, weighted sum (Shazeer et al. 2017)."""
    m = fc2.shape[2]
    chosen = logits.argsort(descending=True, stable=True)[:topk]
    weights = logits[chosen].exp() / logits[chosen].exp().sum()
    total = torch.zeros_like(x)
    for weight, expert in zip(weights, chosen, strict=True):
        total += weight * plain_ffn(fc1[expert, :m], fc1[expert, m:], fc2[expert], x)
    return total


@pytest.mark.parametrize(
    ("granularity", "experts", "topk"), [(1, 8, 2), (1, 3, 3), (2, 8, 2), (4, 16, 8), (24, 48, 24)]
)
@pytest.mark.parametrize("scaling", ["score", "fc2"])
def test_virtual_groups_compute_the_dense_ffn(
    granularity: int, experts: int, topk: int, scaling: Any
) -> None:
    gate, up, down = dense_ffn()
    neurons = replica_map(D, granularity, experts)
    assert neurons.shape == (experts, D // granularity)
    score, fc1_factor, fc2_factor = weight_factors(scaling, granularity)
    fc1 = slice_fc1(gate, up, neurons) * fc1_factor
    fc2 = slice_fc2(down, neurons) * fc2_factor
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(H, generator=random, dtype=torch.float64)
        of_replica = torch.randn(experts // granularity, generator=random, dtype=torch.float64)
        logits = of_replica.repeat_interleave(granularity)
        found = score * plain_mixture(fc1, fc2, logits, topk, x)
        torch.testing.assert_close(found, plain_ffn(gate, up, down, x), rtol=1e-12, atol=1e-12)
        # Without the factor the output is the paper's G times too small.
        bare = plain_mixture(fc1 / fc1_factor, fc2 / fc2_factor, logits, topk, x)
        torch.testing.assert_close(bare * granularity, plain_ffn(gate, up, down, x))


def test_cube_root_is_exact_for_an_ffn_of_degree_three() -> None:
    """ReLU in the place of SiLU: gate, up and down each G^(1/3) times make G times the output."""
    gate, up, down = dense_ffn()
    _, fc1_factor, fc2_factor = weight_factors("cube_root", 8)
    x = torch.randn(H, dtype=torch.float64)

    def relu_ffn(one: float, two: float) -> Tensor:
        return (two * down) @ ((one * gate @ x).clamp(min=0) * (one * up @ x))

    torch.testing.assert_close(relu_ffn(fc1_factor, fc2_factor), 8 * relu_ffn(1, 1))


def test_granularity_must_divide() -> None:
    with pytest.raises(UserError, match="granularity=5 does not divide ffn_hidden_size=24"):
        replica_map(D, 5, 10)
    with pytest.raises(UserError, match="granularity=4 does not divide num_experts=6"):
        replica_map(D, 4, 6)
    with pytest.raises(UserError, match="granularity=0"):
        replica_map(D, 0, 6)


def altered(alteration: Alteration, expert: int = 1, layer: int = 2) -> dict[Matrix, Tensor]:
    """gate, up, down [64 units] in fp32 after the alteration."""
    generator = torch.Generator().manual_seed(5)
    shapes: dict[Matrix, tuple[int, int]] = {"gate": (64, 40), "up": (64, 40), "down": (40, 64)}
    result = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.3 + 0.1
        alteration.apply(weight, layer, expert, name)
        result[name] = weight
    return result


def changed_units(before: dict[Matrix, Tensor], after: dict[Matrix, Tensor]) -> dict[str, Tensor]:
    """Units of which anything changed; those must have changed wholly."""
    units = {}
    for name in before:
        different = before[name] != after[name]
        different = different.T if name == "down" else different
        assert torch.equal(different.any(1), different.all(1)), "a unit changed in part"
        units[name] = different.any(1)
    return units


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("indices", ["shared", "per_matrix"])
def test_drop_upcycling_redraws_a_share_of_units(ratio: float, indices: Any) -> None:
    before = altered(Alteration())
    after = altered(Alteration(seed=7, drop_ratio=ratio, drop_indices=indices))
    units = changed_units(before, after)
    assert all(mask.sum() == int(ratio * 64) for mask in units.values())
    same = torch.equal(units["gate"], units["up"]) and torch.equal(units["gate"], units["down"])
    assert same == (indices == "shared" or ratio in (0.0, 1.0))


def test_dropped_units_are_drawn_from_what_they_replace() -> None:
    """N(mean, std) of the replaced part of each matrix: here unlike the rest of the matrix."""
    weight = torch.randn(4000, 64) * 0.01 + 3.0
    alteration = Alteration(seed=1, drop_ratio=0.5)
    probe = weight.clone()
    alteration.apply(probe, 0, 0, "gate")
    units = (probe != weight).any(1)
    weight[units] = torch.randn(2000, 64) * 0.5 - 1.0
    after = weight.clone()
    alteration.apply(after, 0, 0, "gate")
    assert torch.equal((after != weight).any(1), units)
    old, new = weight[units].double(), after[units].double()
    sigma = 0.5 / np.sqrt(old.numel())
    assert abs(new.mean() - old.mean()) < 5 * sigma
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.02)
    kurtosis = ((new - new.mean()) / new.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3.0, rel=0.05)


def test_noise_is_relative_to_each_matrix() -> None:
    before = altered(Alteration())
    after = altered(Alteration(seed=3, noise=0.1))
    for name, weight in before.items():
        noise = after[name] - weight
        assert noise.std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.06)
        assert abs(noise.mean().item()) < 5 * 0.1 * 0.3 / np.sqrt(noise.numel())


def test_alterations_depend_on_seed_layer_expert_and_matrix_only() -> None:
    alteration = Alteration(seed=3, noise=0.1, drop_ratio=0.5)
    first = altered(alteration)
    torch.manual_seed(99)
    assert all(torch.equal(first[name], again) for name, again in altered(alteration).items())
    others = [
        altered(alteration, expert=2),
        altered(alteration, layer=3),
        altered(Alteration(seed=4, noise=0.1, drop_ratio=0.5)),
        altered(alteration, expert=2, layer=1),
    ]
    for other in others:
        assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["gate"] - altered(Alteration())["gate"], first["up"])


def test_factors_and_16_bit_types() -> None:
    weight = torch.randn(8, 4).to(torch.bfloat16)
    scaled = weight.clone()
    Alteration(fc1_factor=2.0, fc2_factor=4.0).apply(scaled, 0, 0, "up")
    assert torch.equal(scaled, weight * 2)
    Alteration(fc1_factor=2.0, fc2_factor=4.0).apply(scaled, 0, 0, "down")
    assert torch.equal(scaled, weight * 8)
    untouched = weight.clone()
    Alteration().apply(untouched, 0, 0, "up")
    assert Alteration().is_identity and torch.equal(untouched, weight)


def test_merging_weighs_as_xft_does() -> None:
    first, rest = merge_weights(3, 0.75, [0.0, 1.0, -1.0])
    exponentials = np.exp([0.0, 1.0, -1.0])
    assert first == 0.75
    np.testing.assert_allclose(rest.numpy(), 0.25 * exponentials / exponentials.sum(), rtol=1e-12)
    assert merge_weights(4, 0.6, None)[1].tolist() == pytest.approx([0.1] * 4)
    assert merge_weights(4, None, None)[0] == 0.0
    experts, shared = torch.randn(3, 4, 5), torch.randn(4, 5)
    found = merge_experts(experts, rest, shared, first)
    expected = 0.75 * shared.double() + torch.einsum("e,eij->ij", rest, experts.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_merging_copies_gives_the_copy_back() -> None:
    weight = torch.randn(4, 5)
    first, rest = merge_weights(7, 0.75, [0.3 * e for e in range(7)])
    merged = merge_experts(weight.expand(7, -1, -1), rest, weight, first)
    torch.testing.assert_close(merged, weight, rtol=1e-6, atol=1e-6)


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(UserError, match=r"shared_weight=1.5 must lie between 0 and 1"):
        merge_weights(2, 1.5, None)
    for coefficients in ([1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]):
        with pytest.raises(UserError, match="are not 2 finite numbers"):
            merge_weights(2, 0.5, coefficients)
