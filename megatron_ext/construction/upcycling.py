"""Upcycling: experts that are copies of a dense FFN, or of shards of it, made different or not.

A dense SwiGLU FFN of width d_h becomes E experts of width m. Copied experts are described by a
neuron map [E, m] like those of a partition, in which a neuron may belong to many experts; what is
then done to a copy depends on nothing but (seed, layer, expert, matrix).

Why a copied model computes the same at step 0. Our router chooses k experts and softmaxes over
their logits, so the weights p_e of the chosen sum to 1. If every expert is the dense FFN f (G = 1),
the output is sum_e p_e f(x) = f(x). With granularity G an expert is one of G shards, f = sum_g f_g,
and the G shards of a replica share one logit (`routers.router_weights`, `repeats`). With k a
multiple of G the choice consists of k / G whole replicas r, each shard of weight p_r with
G sum_r p_r = 1, so the output is sum_r p_r sum_g f_g(x) = f(x) / G: a factor of G makes it exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

Matrix = Literal["gate", "up", "down"]
_MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
WeightScaling = Literal["score", "fc2", "cube_root"]
DropIndices = Literal["shared", "per_matrix"]


def replica_map(d_ffn: int, granularity: int, num_experts: int) -> Tensor:
    """Virtual groups (He et al. 2024, arXiv 2410.07524): shards 0..G-1, again and again.

    Args:
        d_ffn: d_h.
        granularity: G shards that a dense FFN is cut into; 1: experts are whole copies.
        num_experts: E, a multiple of G: E / G replicas.

    Returns:
        Neuron map [E, d_h / G].

    Raises:
        UserError: G does not divide d_h, or E.
    """
    for name, whole in (("ffn_hidden_size", d_ffn), ("num_experts", num_experts)):
        if granularity < 1 or whole % granularity:
            raise UserError(
                f"granularity={granularity} does not divide {name}={whole}",
                f"choose a divisor of {whole}",
            )
    shards = torch.arange(d_ffn).view(granularity, -1)
    return shards.repeat(num_experts // granularity, 1)


def weight_factors(scaling: WeightScaling, granularity: int) -> tuple[float, float, float]:
    """Factors on (score, fc1, fc2) that make up for the G of the shards' outputs.

    score      the router's score scale is G: exact, and fc1 and fc2 keep the dense values
    fc2        fc2 is G times the dense one: exact, and experts need no scale
    cube_root  fc1 and fc2 are G^(1/3) times the dense ones (arXiv 2410.07524, with G for its
               E G^2 / T: that is the factor of a softmax before the choice, which our
               router does not do). An FFN of degree 3 in its weights would come out exact; SwiGLU
               is only nearly one, so step 0 is approximate. The paper trains best with it.
    """
    factor = float(granularity)
    root = factor ** (1 / 3)
    return {
        "score": (factor, 1.0, 1.0),
        "fc2": (1.0, 1.0, factor),
        "cube_root": (1.0, root, root),
    }[scaling]


@dataclass(frozen=True)
class Alteration:
    """What is done to the matrices of a copied expert."""

    seed: int = 0
    noise: float = 0.0
    """Standard deviation of Gaussian noise, as a share of the matrix's own."""
    drop_ratio: float = 0.0
    """Share r of units that are drawn anew (Drop-Upcycling); 0: none, 1: all."""
    drop_indices: DropIndices = "shared"
    """Whether the three matrices drop the same units (the paper) or each its own (its code)."""
    fc1_factor: float = 1.0
    fc2_factor: float = 1.0

    @property
    def is_identity(self) -> bool:
        factors = (self.fc1_factor, self.fc2_factor)
        return not self.noise and not self.drop_ratio and factors == (1.0, 1.0)

    def apply(self, weight: Tensor, layer: int, expert: int, matrix: Matrix) -> None:
        """Change a matrix in place: gate or up [m, h], down [h, m]."""
        if self.is_identity:
            return
        values = weight.float()
        number = _MATRICES.index(matrix) + 1
        if self.drop_ratio:
            shared = self.drop_indices == "shared"
            choice = _generator(self.seed, layer, expert, 0 if shared else 3 + number)
            axis = 1 if matrix == "down" else 0
            units = dropped_units(values.shape[axis], self.drop_ratio, choice)
            values = reinitialise(values, units, axis, _generator(self.seed, layer, expert, number))
        if self.noise:
            drawn = _generator(self.seed, layer, expert, 6 + number)
            values = values + _normal(drawn, values.shape) * (self.noise * values.std())
        factor = self.fc2_factor if matrix == "down" else self.fc1_factor
        weight.copy_(values * factor)


def dropped_units(width: int, ratio: float, generator: np.random.Generator) -> Tensor:
    """The first floor(r width) units of a random permutation (Drop-Upcycling).

    The paper goes on with the permuted expert; its units are interchangeable, so here they stay in
    place.
    """
    dropped = generator.permutation(width)[: int(ratio * width)]
    return torch.from_numpy(np.sort(dropped))


def reinitialise(
    weight: Tensor, units: Tensor, axis: int, generator: np.random.Generator
) -> Tensor:
    """A copy whose slices `units` along `axis` are drawn from N(mean, std) of what they held.

    Drop-Upcycling (arXiv 2502.19261): mean and standard deviation are those of the replaced part of
    this matrix.
    """
    if not units.numel():
        return weight
    replaced = weight.index_select(axis, units)
    fresh = _normal(generator, replaced.shape).to(weight.dtype)
    fresh = fresh * replaced.std() + replaced.mean()
    return weight.index_copy(axis, units, fresh)


def _generator(*key: int) -> np.random.Generator:
    seed, *rest = key
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 2, *rest, 1))))


def _normal(generator: np.random.Generator, shape: torch.Size) -> Tensor:
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
