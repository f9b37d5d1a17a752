"""Dense models seen as a Mixture of Experts of copies, and such a mixture seen as a dense model.

Neither is ever in memory: a tensor is made when it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FC2,
    ROUTER,
    ROUTER_OUT,
    SHARED_FC1,
    SHARED_FC2,
    Weights,
    layer_key,
    tensor_shapes,
)
from megatron_ext.config import ModelConfig
from megatron_ext.construction.merging import merge_experts, merge_weights
from megatron_ext.construction.partition import slice_fc1, slice_fc2
from megatron_ext.construction.routers import RouterInit, router_weights
from megatron_ext.construction.statistics import Statistics
from megatron_ext.construction.upcycling import Alteration
from megatron_ext.errors import UserError

# These say nothing about what the weights compute.
_NOT_THE_ARCHITECTURE = ("init_method_std",)


def check_sources(sources: Sequence[Weights], names: Sequence[str]) -> None:
    """Check that dense models can share experts and be averaged.

    Raises:
        UserError: one has experts already, or two differ in shape, norm or RoPE.
    """
    for weights, name in zip(sources, names, strict=True):
        if weights.model.is_moe:
            raise UserError(f"{name} has experts already", "upcycle a dense model")
        for field in dataclasses.fields(ModelConfig):
            first, other = (getattr(w.model, field.name) for w in (sources[0], weights))
            if first != other and field.name not in _NOT_THE_ARCHITECTURE:
                raise UserError(
                    f"{names[0]} and {name} are different models: "
                    f"{field.name} is {first} and {other}",
                    "all must be trained from one seed model",
                )


class UpcycledWeights:
    """Experts copied from dense weights (`tensors.Weights`)."""

    def __init__(
        self,
        sources: Sequence[Weights],
        model: ModelConfig,
        neurons: Tensor,
        alteration: Alteration,
        router_init: RouterInit = "normal",
        router_std: float = 0.02,
        repeats: int = 1,
        statistics: Statistics | None = None,
        base: Weights | None = None,
    ) -> None:
        """Describe the mixture.

        Args:
            sources: n dense models of one architecture (see `check_sources`); the first E / n
                experts come from the first, and so on.
            model: the MoE.
            neurons: map [E, m] of every MoE layer: the part of its source that an expert copies.
            alteration: what is done to the copies; a shared expert stays as the first source's FFN.
            router_init, router_std, repeats, statistics: see `routers.router_weights`; the seed is
                the alteration's.
            base: what all weights but the experts' are taken from; none: the mean of the sources.

        Raises:
            UserError: the model is impossible, or E is no multiple of n.
        """
        model.validate()
        assert model.num_experts is not None and len(neurons) == model.num_experts
        if model.num_experts % len(sources):
            raise UserError(
                f"num_experts={model.num_experts} is not a multiple of the {len(sources)} sources",
                f"set num_experts to {len(sources)}, or leave it unset",
            )
        self.model, self.dtype = model, sources[0].dtype
        self._sources, self._neurons, self._alteration = sources, neurons, alteration
        self._router = (router_init, router_std)
        self._repeats, self._statistics = repeats, statistics
        self._others = sources if base is None else (base,)
        self._dense_keys = tensor_shapes(sources[0].model).keys()

    def tensor(self, key: str) -> Tensor:
        if key in self._dense_keys:
            return mean(self._others, key)
        _, _, number, name = key.split(".", 3)
        layer = int(number)
        if name == EXPERTS_FC1:
            return self._experts_fc1(layer)
        if name == EXPERTS_FC2:
            return self._experts_fc2(layer)
        if name in (SHARED_FC1, SHARED_FC2):
            return self._sources[0].tensor(layer_key(layer, FC1 if name == SHARED_FC1 else FC2))
        model = self.model
        assert model.num_experts is not None
        weight, out = router_weights(
            model.num_experts,
            model.hidden_size,
            model.moe_gate,
            *self._router,
            self._alteration.seed,
            layer,
            self._statistics,
            self._repeats,
        )
        if name == ROUTER:
            return weight
        assert name == ROUTER_OUT and out is not None, key
        return out

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.tensor(layer_key(layer, FC1)).chunk(2)
        return gate, up

    def _of_source(self, number: int) -> range:
        share = len(self._neurons) // len(self._sources)
        return range(number * share, (number + 1) * share)

    def _experts_fc1(self, layer: int) -> Tensor:
        experts, width = self._neurons.shape
        fc1 = torch.empty(experts, 2 * width, self.model.hidden_size, dtype=self.dtype)
        for number, source in enumerate(self._sources):
            gate, up = source.gate_up(layer)
            for expert in self._of_source(number):
                fc1[expert] = slice_fc1(gate, up, self._neurons[expert : expert + 1])[0]
                self._alteration.apply(fc1[expert, :width], layer, expert, "gate")
                self._alteration.apply(fc1[expert, width:], layer, expert, "up")
        return fc1

    def _experts_fc2(self, layer: int) -> Tensor:
        experts, width = self._neurons.shape
        fc2 = torch.empty(experts, self.model.hidden_size, width, dtype=self.dtype)
        for number, source in enumerate(self._sources):
            down = source.tensor(layer_key(layer, FC2))
            for expert in self._of_source(number):
                fc2[expert] = slice_fc2(down, self._neurons[expert : expert + 1])[0]
                self._alteration.apply(fc2[expert], layer, expert, "down")
        return fc2


def mean(weights: Sequence[Weights], key: str, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of a tensor over models, taken in fp32; none: of the first one's type."""
    first = weights[0].tensor(key)
    dtype = dtype or first.dtype
    if len(weights) == 1:
        return first.to(dtype)
    total = first.float().clone()
    for other in weights[1:]:
        total += other.tensor(key).float()
    return (total / len(weights)).to(dtype)


class MergedWeights:
    """A mixture's experts, each as wide as the dense FFN, as one FFN again (`tensors.Weights`)."""

    def __init__(
        self,
        experts: Weights,
        shared_weight: float | None = None,
        coefficients: list[list[float]] | None = None,
    ) -> None:
        """Describe the dense model.

        Args:
            experts: a model with experts of the dense FFN's width.
            shared_weight: lambda of XFT's shared expert; none where there is no shared expert.
            coefficients: E numbers for every MoE layer (see `merging.merge_weights`); none: equal.

        Raises:
            UserError: there is nothing to merge, experts of another width, no or an extra lambda,
                or coefficients of another shape.
        """
        model = experts.model
        if not model.is_moe:
            raise UserError("the source is dense already")
        assert model.num_experts is not None
        shared_width = model.moe_shared_expert_intermediate_size
        if (shared_width is None) != (shared_weight is None):
            raise UserError(
                "a shared weight is for models with a shared expert, and they need it",
                f"the model has {'a' if shared_width else 'no'} shared expert",
            )
        widths = {model.expert_width, shared_width or model.ffn_hidden_size, model.ffn_hidden_size}
        if len(widths) > 1:
            raise UserError(
                f"experts of width {model.expert_width} cannot be added up to an FFN of width "
                f"{model.ffn_hidden_size}",
                "merge experts that are whole FFNs (upcycle --method copies, branch_train_mix, "
                "drop_upcycling or xft)",
            )
        layers = model.moe_layers
        if coefficients is not None and len(coefficients) != len(layers):
            raise UserError(
                f"{len(coefficients)} rows of coefficients for {len(layers)} MoE layers"
            )
        self._experts, self.dtype = experts, experts.dtype
        self._weights = {
            layer: merge_weights(
                model.num_experts, shared_weight, coefficients[row] if coefficients else None
            )
            for row, layer in enumerate(layers)
        }
        plain = ModelConfig()
        self.model = dataclasses.replace(
            model,
            num_experts=None,
            **{
                field.name: getattr(plain, field.name)
                for field in dataclasses.fields(plain)
                if field.name.startswith(("moe_", "lora_"))
            },
        )

    def tensor(self, key: str) -> Tensor:
        names = {FC1: (EXPERTS_FC1, SHARED_FC1), FC2: (EXPERTS_FC2, SHARED_FC2)}
        number, _, name = key.removeprefix("decoder.layers.").partition(".")
        if name not in names or int(number) not in self._weights:
            return self._experts.tensor(key)
        layer = int(number)
        routed, shared = (layer_key(layer, part) for part in names[name])
        first, rest = self._weights[layer]
        has_shared = self._experts.model.moe_shared_expert_intermediate_size is not None
        return merge_experts(
            self._experts.tensor(routed),
            rest,
            self._experts.tensor(shared) if has_shared else None,
            first,
        )

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self.tensor(layer_key(layer, FC1)).chunk(2)
        return gate, up
