"""Full experts seen as LoRA experts over one FFN, and LoRA experts seen as full ones.

Neither is ever in memory: a tensor is made when it is asked for, one layer's experts at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    lora_names,
    tensor_shapes,
)
from megatron_ext.checkpoint.upcycled import MergedWeights
from megatron_ext.construction.low_rank import factorise
from megatron_ext.model_config import LoraTarget, ModelConfig
from megatron_ext.random_keys import mixed_seed

_NUMBERS: dict[LoraTarget, int] = {"gate": 1, "up": 2, "down": 3}


class LoraWeights:
    """Experts as adapters over a dense model's FFNs (`tensors.Weights`).

    An adapter is its expert's difference to the dense FFN, as far as the rank goes; a matrix that
    is no target keeps the dense model's.
    """

    def __init__(
        self,
        base: Weights,
        experts: Weights,
        rank: int,
        alpha: float,
        targets: Sequence[LoraTarget],
        seed: int,
    ) -> None:
        """Describe the mixture.

        Args:
            base: the dense model whose FFNs are shared.
            experts: a mixture of full experts of their width; all else is taken from it.
            rank, alpha, targets: see `ModelConfig`.
            seed: of what is drawn.

        Raises:
            UserError: the model is impossible.
        """
        self.model = dataclasses.replace(
            experts.model, lora_rank=rank, lora_alpha=alpha, lora_targets=list(targets)
        )
        self.model.validate()
        self.dtype = experts.dtype
        self._base, self._experts, self._seed = base, experts, seed
        self._names = lora_names(targets)
        self._made: dict[str, Tensor] = {}

    def tensor(self, key: str) -> Tensor:
        layer, name = _place(key)
        if layer not in self.model.moe_layers:
            return self._experts.tensor(key)
        if name in (FC1, FC2):
            return self._base.tensor(key).to(self.dtype)
        if not any(name in names for names in self._names.values()):
            return self._experts.tensor(key)
        if key not in self._made:
            # Gate and up are parts of one tensor, which is not made twice; factors are small.
            down = name in self._names.get("down", ())
            self._made = self._factors(layer, ["down"] if down else ["gate", "up"])
        return self._made[key]

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.tensor(layer_key(layer, FC1)).chunk(2)
        return gate, up

    def _factors(self, layer: int, targets: Sequence[LoraTarget]) -> dict[str, Tensor]:
        deltas = _deltas(self._experts, self._base, layer, "down" in targets)
        shapes, made = tensor_shapes(self.model), {}
        for target in (target for target in targets if target in self._names):
            a, b = (layer_key(layer, name) for name in self._names[target])
            made[a], made[b] = (torch.empty(shapes[key], dtype=self.dtype) for key in (a, b))
            for expert, delta in enumerate(_rows(deltas, target)):
                key = (self._seed, layer, expert, _NUMBERS[target])
                factors = factorise(
                    delta, made[a].shape[1], self.model.lora_scale, mixed_seed(*key)
                )
                made[a][expert], made[b][expert] = factors
        return made


class FullExperts:
    """A mixture of LoRA experts as one whose experts are FFNs of their own (`tensors.Weights`)."""

    def __init__(self, lora: Weights) -> None:
        plain = ModelConfig()
        self.model = dataclasses.replace(
            lora.model, lora_rank=None, lora_alpha=plain.lora_alpha, lora_targets=plain.lora_targets
        )
        self.dtype, self._lora = lora.dtype, lora
        self._names = lora_names(lora.model.lora_targets)

    def tensor(self, key: str) -> Tensor:
        layer, name = _place(key)
        if name not in (EXPERTS_FC1, EXPERTS_FC2):
            return self._lora.tensor(key)
        first = name == EXPERTS_FC1
        base = self._lora.tensor(layer_key(layer, FC1 if first else FC2))
        assert self.model.num_experts is not None
        experts = base.expand(self.model.num_experts, *base.shape).clone()
        targets: list[LoraTarget] = ["gate", "up"] if first else ["down"]
        for target in (target for target in targets if target in self._names):
            factors = (self._lora.tensor(layer_key(layer, part)) for part in self._names[target])
            for weight, a, b in zip(_rows(experts, target), *factors, strict=True):
                change = (b.float() @ a.float()).mul_(self._lora.model.lora_scale)
                weight.copy_(change.add_(weight))  # added in fp32, rounded once
        return experts

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._lora.gate_up(layer)


def full_experts(weights: Weights) -> Weights:
    """A mixture with full experts; one that has them already as it is."""
    return weights if weights.model.lora_rank is None else FullExperts(weights)


def as_dense(weights: Weights) -> Weights:
    """A mixture of one expert, which a dense model's LoRA tuning leaves, as a dense model."""
    return MergedWeights(full_experts(weights)) if weights.model.num_experts == 1 else weights


def lost(lora: Weights, experts: Weights, base: Weights) -> Tensor:
    """What LoRA experts lack of full ones, as a share of those' difference to the dense FFN.

    Args:
        lora: a mixture of LoRA experts.
        experts: the mixture of full experts that it was made of.
        base: the dense model whose FFNs it shares.

    Returns:
        [layers, E]: norm of what is lost over norm of the difference, both over gate, up and down;
        0 where there is no difference.
    """
    found = full_experts(lora)
    shares = []
    for layer in tqdm(lora.model.moe_layers, desc="comparing experts", unit="layer"):
        missing = differing = torch.zeros(())
        for down in (False, True):
            wanted, kept = (_deltas(mixture, base, layer, down) for mixture in (experts, found))
            differing = differing + wanted.square().sum((1, 2), dtype=torch.float64)
            missing = missing + wanted.sub_(kept).square_().sum((1, 2), dtype=torch.float64)
        shares.append((missing / differing.clamp(min=1e-300)).sqrt())
    return torch.stack(shares)


def _deltas(experts: Weights, base: Weights, layer: int, down: bool) -> Tensor:
    """Experts minus the dense FFN in fp32: fc2 [E, h, m] or fc1 [E, 2m, h]."""
    full, dense = (EXPERTS_FC2, FC2) if down else (EXPERTS_FC1, FC1)
    deltas = experts.tensor(layer_key(layer, full)).float()
    return deltas - base.tensor(layer_key(layer, dense)).float()


def _rows(experts: Tensor, target: LoraTarget) -> Tensor:
    """A target's part of experts' fc1 or fc2."""
    if target == "down":
        return experts
    gate, up = experts.chunk(2, dim=1)
    return gate if target == "gate" else up


def _place(key: str) -> tuple[int, str]:
    """Layer and name of a key; -1 where it is of no layer."""
    number, _, name = key.removeprefix("decoder.layers.").partition(".")
    return (int(number), name) if number.isdigit() else (-1, key)
