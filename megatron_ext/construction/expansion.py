"""UpIT's expert expansion: m checkpoints of one tuning run become n experts (arXiv 2410.01610).

Checkpoint i of the run is d_i = theta_i - theta_base away from the model it started from. Until
there are n experts, the two least alike are merged into a child, whose delta is
DARE(alpha d_j + beta d_k) with random alpha + beta = 1. No data is looked at.

The published descriptions leave much open. What is chosen here, and why; all of it is an option:

    deltas           DARE acts on deltas, not on weights: most of a tuned model's weights matter,
                     most of its delta does not (arXiv 2311.03099)
    masks            each weighted delta has its own, as when DARE merges models: where parents
                     agree the noise is smaller than that of one mask on the sum
    drop             p = 0.5: the noise in an entry is as large as the entry. DARE's tuned models
                     stood 0.9, the larger ones more
    similarity       cosine of the FFNs' deltas over all layers, so that a child has the same
                     parents everywhere; l2, and parents of each layer's own
    pool             only checkpoints are parents. DARE's noise makes a child the least alike of
                     all: where children can be parents, they mostly have each other, and noise
                     adds to noise. How similar they will be follows from the Gram matrix before
                     they are made, since merges (but TIES) are linear in the deltas: exactly, for
                     DARE in expectation
    pairs            a pair comes again only when every pair was used as often; else the most
                     dissimilar two checkpoints, mostly the first and the last, have all children
    alpha            uniform, or Beta(a, a)

Everything drawn depends on (seed, child, layer, matrix) only, so that tensors can be made one at a
time and in any order. Not here: UpIT's third stage, which trains routing vectors on each expert's
own data before the experts are put together, and the comparison with other ways of upcycling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

MergeMethod = Literal["dare", "average", "task_arithmetic", "ties"]
Mask = Literal["each", "sum"]
Measure = Literal["cosine", "l2"]
_BLOCK = 1 << 20
_DECIMALS = 9  # dissimilarities that differ by less are rounding, and equal


@dataclass(frozen=True)
class Merge:
    """How two deltas d_1, d_2 with weights w_1, w_2 become one.

    dare             s (DARE(w_1 d_1) + DARE(w_2 d_2)), or s DARE(w_1 d_1 + w_2 d_2)
    average          (d_1 + d_2) / 2
    task_arithmetic  s (w_1 d_1 + w_2 d_2)
    ties             s times the weighted mean of the entries that survive `ties`
    """

    method: MergeMethod = "dare"
    drop: float = 0.5
    """Probability p with which DARE drops an entry."""
    mask: Mask = "each"
    """Whether DARE drops entries of each weighted delta, or of their sum."""
    share: float = 0.2
    """Share of a matrix's entries, the largest, that TIES keeps."""
    scale: float = 1.0
    """Factor s on the merged delta (not of the average)."""

    def validate(self) -> None:
        """Raise a UserError where an option is out of range."""
        if not 0 <= self.drop < 1:
            raise UserError(f"dare_drop={self.drop} must lie between 0 and 1, and below 1")
        if not 0 < self.share <= 1:
            raise UserError(f"ties_share={self.share} must lie between 0 and 1, and above 0")
        if not np.isfinite(self.scale):
            raise UserError(f"merge_scale={self.scale} must be a number")

    def apply(
        self, deltas: Sequence[Tensor], weights: Sequence[float], key: tuple[int, ...]
    ) -> Tensor:
        """The merged delta.

        Args:
            deltas: of one shape and floating type.
            weights: one for each.
            key: (seed, child, layer, matrix), which DARE's masks are drawn for.
        """
        if self.method == "ties":
            return ties(deltas, weights, self.share) * self.scale
        weighted = [d * w for d, w in zip(deltas, self.linear(weights), strict=True)]
        if self.method != "dare":
            return _sum(weighted)
        if self.mask == "sum":
            weighted = [_sum(weighted)]
        return _sum([dare(d, self.drop, _generator(*key, n)) for n, d in enumerate(weighted)])

    def linear(self, weights: Sequence[float]) -> list[float]:
        """Coefficients of the deltas in the merged one, or (dare) in its expectation."""
        assert self.method != "ties"
        if self.method == "average":
            return [1 / len(weights)] * len(weights)
        return [self.scale * weight for weight in weights]


def dare(delta: Tensor, drop: float, generator: np.random.Generator) -> Tensor:
    """Drop And REscale (arXiv 2311.03099): entries become 0 with probability p, else d / (1 - p).

    The expectation is d, the variance p / (1 - p) d^2.
    """
    drawn = generator.random(tuple(delta.shape), dtype=np.float32)
    return delta * torch.from_numpy(drawn >= np.float32(drop)) / (1 - drop)


def ties(deltas: Sequence[Tensor], weights: Sequence[float], share: float) -> Tensor:
    """TrIm, Elect Sign and merge (arXiv 2306.01708), matrix by matrix.

    Of each delta the largest entries stay; an entry's sign is that of their weighted sum (+ where
    it is 0); the entries of that sign are averaged with their weights. With equal weights that is
    the paper's rule, but for trimming each matrix rather than the model as one vector.
    """
    trimmed = [trim(delta, share) for delta in deltas]
    sign = torch.where(_sum([t * w for t, w in zip(trimmed, weights, strict=True)]) >= 0, 1, -1)
    total, weight = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for part, w in zip(trimmed, weights, strict=True):
        agrees = part * sign > 0
        total += part * agrees * w
        weight += agrees * w
    return torch.where(weight > 0, total / weight, 0.0)


def trim(delta: Tensor, share: float) -> Tensor:
    """A delta with its largest entries only, at least one; entries as large as the last stay."""
    size = delta.abs()
    kept = max(1, round(share * delta.numel()))
    threshold = size.flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(size >= threshold, delta, 0.0)


def gram(base: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Inner products <t_i - base, t_j - base> [m, m] in float64; those of several tensors add up.

    Args:
        base: of any shape and floating type.
        tensors: m of the same shape.
    """
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    origin, rows = base.reshape(-1), [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, len(origin), _BLOCK):
        part = slice(start, start + _BLOCK)
        deltas = torch.stack([row[part].double() for row in rows]) - origin[part].double()
        total += deltas @ deltas.T
    return total


def dissimilarity(gram: Tensor, measure: Measure) -> Tensor:
    """How far apart deltas are, from their Gram matrix [m, m].

    Returns:
        [m, m]. cosine: 1 - cos (a zero delta is like another zero one, and at right angles to the
        rest). l2: the squared distance over the largest squared norm.
    """
    squared = gram.diagonal().clamp(min=0)
    if measure == "l2":
        distance = squared[:, None] + squared - 2 * gram
        return (distance / squared.max().clamp(min=1e-300)).round(decimals=_DECIMALS)
    norms = squared.sqrt()
    product = norms[:, None] * norms
    alike = (norms[:, None] == norms).double()
    return (1 - torch.where(product > 0, gram / product, alike)).round(decimals=_DECIMALS)


@dataclass(frozen=True)
class Child:
    """A merged expert."""

    parents: tuple[int, int]
    """Experts j < k: checkpoints come first, then the children in their order."""
    alpha: float
    """Weight of parent j; parent k has beta = 1 - alpha."""

    @property
    def weights(self) -> tuple[float, float]:
        return self.alpha, 1 - self.alpha


@dataclass(frozen=True)
class Selection:
    """How a child gets its parents and their weights; see the top of this file."""

    parents: Literal["dissimilar", "random"] = "dissimilar"
    measure: Measure = "cosine"
    child_joins: bool = False
    """Whether a child can become a parent."""
    repeat_pairs: bool = False
    """Whether a pair comes again while others were used less often."""
    concentration: float = 1.0
    """a of alpha's distribution Beta(a, a): 1: uniform; larger: nearer to one half."""


def check_expansion(
    num_checkpoints: int, num_experts: int, seed: int, selection: Selection, merge: Merge
) -> None:
    """Check before any work that `plan_expansion` can plan.

    Raises:
        UserError: fewer than two checkpoints, n < m, an option out of range, or children whose
            similarity cannot be known.
    """
    if num_checkpoints < 2:
        raise UserError(
            f"expansion merges pairs of checkpoints, and there is only {num_checkpoints}",
            "give several checkpoints of the tuning run, or use upcycle for copies of one",
        )
    if num_experts < num_checkpoints:
        raise UserError(
            f"num_experts={num_experts} is less than the {num_checkpoints} checkpoints",
            "every checkpoint is an expert: give fewer, or raise num_experts",
        )
    if seed < 0 or not 0 < selection.concentration < np.inf:
        raise UserError(
            f"seed={seed} must not be negative, "
            f"alpha_concentration={selection.concentration} must be above 0"
        )
    merge.validate()
    if selection.parents == "dissimilar" and selection.child_joins and merge.method == "ties":
        raise UserError(
            "how similar a child of merge=ties is can only be known once it is made",
            "leave out --child-joins, or use --parents random or another merge",
        )


def plan_expansion(
    num_checkpoints: int,
    num_experts: int,
    seed: int,
    selection: Selection,
    merge: Merge,
    gram: Tensor | None = None,
    stream: int = 0,
) -> list[Child]:
    """Choose the parents of n - m children.

    Args:
        num_checkpoints: m.
        num_experts: n.
        seed: of all that is drawn.
        selection: how parents are chosen.
        merge: what a child will be.
        gram: [m, m] of the checkpoints' deltas; random parents need none.
        stream: number of this plan, where a seed makes several (one for each layer).

    Raises:
        UserError: see `check_expansion`.
    """
    check_expansion(num_checkpoints, num_experts, seed, selection, merge)
    known = gram if selection.parents == "dissimilar" else None
    assert known is not None or selection.parents == "random" or num_experts == num_checkpoints
    pool, used, children = num_checkpoints, Counter[tuple[int, int]](), []
    for number in range(num_experts - num_checkpoints):
        generator = _generator(seed, stream, number)
        pairs = list(combinations(range(pool), 2))
        if not selection.repeat_pairs:
            fewest = min(used[pair] for pair in pairs)
            pairs = [pair for pair in pairs if used[pair] == fewest]
        if known is None:
            pair = pairs[int(generator.integers(len(pairs)))]
        else:
            apart = dissimilarity(known, selection.measure)
            first, second = torch.tensor(pairs).T
            pair = pairs[int(apart[first, second].argmax())]  # the first of equal ones
        used[pair] += 1
        a = selection.concentration
        child = Child(pair, 0.5 if merge.method == "average" else float(generator.beta(a, a)))
        children.append(child)
        if selection.child_joins:
            pool += 1
            known = None if known is None else with_child(known, child, merge)
    return children


def with_child(gram: Tensor, child: Child, merge: Merge) -> Tensor:
    """The Gram matrix [m, m] of deltas, with a child's as the last of [m + 1, m + 1].

    The child's delta is a linear combination of its parents' and, under DARE, noise that is
    independent of all others: it only adds to the child's squared norm (here, its expectation).
    """
    mix = torch.zeros(len(gram), dtype=torch.float64)
    mix[list(child.parents)] = torch.tensor(merge.linear(child.weights), dtype=torch.float64)
    row = gram @ mix
    norm = mix @ row
    if merge.method == "dare":
        masked = norm if merge.mask == "sum" else mix.square() @ gram.diagonal()
        norm = norm + merge.drop / (1 - merge.drop) * masked
    return torch.cat(
        [torch.cat([gram, row[:, None]], dim=1), torch.cat([row, norm[None]])[None]], dim=0
    )


def _generator(*key: int) -> np.random.Generator:
    seed, *rest = key
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 3, *rest, 1))))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
