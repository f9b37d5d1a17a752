"""Checkpoints of one tuning run and merged children of theirs seen as a Mixture of Experts (UpIT).

The mixture is never in memory: a tensor is made when it is asked for, out of the same tensor of
every checkpoint. Expert i < m is the FFN of checkpoint i, bit by bit; the children follow
(`construction.expansion`). Routers start as `construction.routers` has them; UpIT's third stage,
the training of routing vectors, is `training.router_init`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FC2,
    Weights,
    layer_key,
)
from megatron_ext.checkpoint.upcycled import UpcycledWeights, mean
from megatron_ext.config import ModelConfig
from megatron_ext.construction.expansion import Child, Merge, gram
from megatron_ext.construction.routers import RouterInit
from megatron_ext.construction.statistics import Statistics
from megatron_ext.construction.upcycling import Alteration, Matrix, replica_map
from megatron_ext.errors import UserError

_NUMBERS: dict[Matrix, int] = {"gate": 1, "up": 2, "down": 3}


class ExpandedWeights:
    """m checkpoints and n - m merged children as experts (`tensors.Weights`)."""

    def __init__(
        self,
        base: Weights,
        checkpoints: Sequence[Weights],
        rest: Weights,
        model: ModelConfig,
        children: Mapping[int, Sequence[Child]],
        merge: Merge,
        seed: int,
        router_init: RouterInit = "normal",
        router_std: float = 0.02,
        statistics: Statistics | None = None,
    ) -> None:
        """Describe the mixture.

        Args:
            base: the model that the tuning run started from; deltas are measured from it.
            checkpoints: m dense models of its architecture (see `upcycled.check_sources`).
            rest: what attention, embeddings, norms and dense layers are taken from.
            model: the MoE, with experts of the dense FFN's width.
            children: the n - m children of every MoE layer (see `expansion.plan_expansion`).
            merge: how a child is made of its parents.
            seed: of merging and of a random router.
            router_init, router_std, statistics: see `routers.router_weights`.

        Raises:
            UserError: the model is impossible.
        """
        assert model.num_experts is not None
        neurons = replica_map(model.ffn_hidden_size, 1, model.num_experts)
        self._others = UpcycledWeights(
            [rest],
            model,
            neurons,
            Alteration(seed=seed),
            router_init,
            router_std,
            statistics=statistics,
        )
        planned = {len(checkpoints) + len(children[layer]) for layer in model.moe_layers}
        assert planned == {model.num_experts}, planned
        self.model, self.dtype = model, reduce(torch.promote_types, (w.dtype for w in checkpoints))
        self._base, self._checkpoints, self._children = base, checkpoints, children
        self._merge, self._seed = merge, seed

    def tensor(self, key: str) -> Tensor:
        number, _, name = key.removeprefix("decoder.layers.").partition(".")
        if name == EXPERTS_FC1:
            return self._experts_fc1(int(number))
        if name == EXPERTS_FC2:
            return self._experts_fc2(int(number))
        return self._others.tensor(key)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._others.gate_up(layer)

    def _experts_fc1(self, layer: int) -> Tensor:
        model = self.model
        assert model.num_experts is not None
        width = model.expert_width
        fc1 = torch.empty(model.num_experts, 2 * width, model.hidden_size, dtype=self.dtype)
        for expert, checkpoint in enumerate(self._checkpoints):
            fc1[expert, :width], fc1[expert, width:] = checkpoint.gate_up(layer)
        gate, up = self._base.gate_up(layer)
        self._add_children(fc1[:, :width], gate, layer, "gate")
        self._add_children(fc1[:, width:], up, layer, "up")
        return fc1

    def _experts_fc2(self, layer: int) -> Tensor:
        model, key = self.model, layer_key(layer, FC2)
        assert model.num_experts is not None
        fc2 = torch.empty(
            model.num_experts, model.hidden_size, model.expert_width, dtype=self.dtype
        )
        for expert, checkpoint in enumerate(self._checkpoints):
            fc2[expert] = checkpoint.tensor(key)
        self._add_children(fc2, self._base.tensor(key), layer, "down")
        return fc2

    def _add_children(self, experts: Tensor, base: Tensor, layer: int, matrix: Matrix) -> None:
        """Fill in experts m, m + 1, ...; a parent is what is stored of it, child or not."""
        origin = base.float()
        for number, child in enumerate(self._children[layer]):
            deltas = [experts[parent].float() - origin for parent in child.parents]
            key = (self._seed, number, layer, _NUMBERS[matrix])
            merged = self._merge.apply(deltas, child.weights, key)
            experts[len(self._checkpoints) + number] = merged + origin


class MeanWeights:
    """The mean of dense models of one architecture, taken in fp32 (`tensors.Weights`)."""

    def __init__(self, models: Sequence[Weights]) -> None:
        self._models, self.model, self.dtype = models, models[-1].model, models[-1].dtype

    def tensor(self, key: str) -> Tensor:
        return mean(self._models, key, self.dtype)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.tensor(layer_key(layer, FC1)).chunk(2)
        return gate, up


def delta_grams(
    base: Weights, checkpoints: Sequence[Weights], layers: Iterable[int]
) -> dict[int, Tensor]:
    """Gram matrices [m, m] of the FFNs' deltas, layer by layer; those of all layers add up.

    Of the FFNs alone, since the experts are nothing else. One matrix of each model is in memory at
    a time.
    """
    grams = {}
    for layer in tqdm(layers, desc="comparing checkpoints", unit="layer"):
        key = layer_key(layer, FC2)
        total = gram(base.tensor(key), [weights.tensor(key) for weights in checkpoints])
        others = [weights.gate_up(layer) for weights in checkpoints]
        halves = zip(base.gate_up(layer), *others, strict=True)
        for origin, *tensors in halves:
            total += gram(origin, tensors)
        grams[layer] = total
    return grams


def check_checkpoints(mixture: Weights, checkpoints: Sequence[Weights]) -> None:
    """Check that the first m experts of a stored mixture are the checkpoints' FFNs, bit by bit.

    Raises:
        UserError: one is not.
    """
    for layer in tqdm(mixture.model.moe_layers, desc="checking experts", unit="layer"):
        for stored, source in ((EXPERTS_FC1, FC1), (EXPERTS_FC2, FC2)):
            experts = mixture.tensor(layer_key(layer, stored))
            for number, checkpoint in enumerate(checkpoints):
                expected = checkpoint.tensor(layer_key(layer, source))
                if not torch.equal(experts[number], expected.to(experts.dtype)):
                    raise UserError(
                        f"{stored} of expert {number} in layer {layer} is not its checkpoint's",
                        "this is a fault of the converter: report it",
                    )
