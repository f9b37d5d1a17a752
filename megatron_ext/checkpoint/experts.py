"""A dense model seen as a Mixture of Experts, layer by layer, with neither of them in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint.tensors import (
    ATTENTION_NORM,
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    ROUTER,
    ROUTER_OUT,
    SHARED_FC1,
    SHARED_FC2,
    Weights,
    layer_key,
    tensor_shapes,
)
from megatron_ext.config import ModelConfig
from megatron_ext.construction import methods, partition
from megatron_ext.construction.methods import Split
from megatron_ext.construction.partition import NeuronMap
from megatron_ext.construction.routers import RouterInit, router_weights
from megatron_ext.construction.statistics import Statistics
from megatron_ext.errors import UserError
from megatron_ext.recipe import to_dict


class PartitionedWeights:
    """Experts cut out of dense weights by a neuron map for each layer (`tensors.Weights`)."""

    def __init__(
        self,
        dense: Weights,
        model: ModelConfig,
        neurons: dict[int, NeuronMap],
        seed: int,
        router_init: RouterInit = "normal",
        router_std: float = 0.02,
        statistics: Statistics | None = None,
    ) -> None:
        """Check that model and map fit the dense weights.

        Args:
            dense: what is cut.
            model: the MoE: the dense model's shape with experts added.
            neurons: map of every MoE layer.
            seed: of the routers.
            router_init, router_std, statistics: see `routers.router_weights`.

        Raises:
            UserError: `dense` has experts already.
        """
        if dense.model.is_moe:
            raise UserError("the source has experts already", "partition a dense model")
        model.validate()
        assert set(neurons) == set(model.moe_layers)
        self.dense, self.model, self.neurons, self.dtype = dense, model, neurons, dense.dtype
        self._seed, self._router_init, self._router_std = seed, router_init, router_std
        self._statistics = statistics
        self._dense_keys = tensor_shapes(dense.model).keys()

    def tensor(self, key: str) -> Tensor:
        if key in self._dense_keys:
            return self.dense.tensor(key)
        _, _, number, name = key.split(".", 3)
        layer = int(number)
        if name in (EXPERTS_FC1, EXPERTS_FC2):
            return self._cut(layer, name == EXPERTS_FC1, self.neurons[layer].experts)
        if name in (SHARED_FC1, SHARED_FC2):
            return self._cut(layer, name == SHARED_FC1, self.neurons[layer].residual[None])[0]
        model = self.model
        assert model.num_experts is not None
        weight, out = router_weights(
            model.num_experts,
            model.hidden_size,
            model.moe_gate,
            self._router_init,
            self._router_std,
            self._seed,
            layer,
            self._statistics,
        )
        if name == ROUTER:
            return weight
        assert name == ROUTER_OUT and out is not None, key
        return out

    def _cut(self, layer: int, first: bool, neurons: Tensor) -> Tensor:
        if first:
            return partition.slice_fc1(*self.dense.gate_up(layer), neurons)
        return partition.slice_fc2(self.dense.tensor(layer_key(layer, FC2)), neurons)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.dense.gate_up(layer)


def moe_model(dense: ModelConfig, split: Split, **options: Any) -> ModelConfig:
    """The mixture that a split makes of a dense model.

    Args:
        dense: the dense model.
        split: how its FFNs are cut.
        options: other fields of the mixture's ModelConfig.

    Raises:
        UserError: they do not fit together.
    """
    split_evenly = split.width * split.num_experts == dense.ffn_hidden_size
    model = dataclasses.replace(
        dense,
        num_experts=split.num_experts,
        moe_ffn_hidden_size=None if split_evenly else split.width,
        moe_shared_expert_intermediate_size=split.num_residual * split.width or None,
        **options,
    )
    model.validate()
    return model


def split_layers(
    dense: Weights, layers: Iterable[int], split: Split, statistics: Statistics | None
) -> dict[int, NeuronMap]:
    """The neuron map of every layer that becomes a mixture; one layer is in memory at a time.

    Raises:
        UserError: see `methods.neuron_map`.
    """
    maps = {}
    reads = bool(methods.METHODS[split.method].statistics)
    for layer in tqdm(layers, desc=f"{split.method}: choosing neurons", unit="layer"):
        view = methods.DenseLayer(
            layer,
            partial(dense.gate_up, layer),
            partial(dense.tensor, layer_key(layer, FC2)),
            statistics.layer(layer) if statistics is not None and reads else None,
        )
        maps[layer] = methods.neuron_map(view, split)
    return maps


def fingerprint(weights: Weights) -> str:
    """Names a model by its shape and the weights of its norms: the same for every file format."""
    model = weights.model
    # What a dense model has: options of experts may be added without giving it another name.
    options = ("moe_", "lora_", "num_experts")
    shape = {k: v for k, v in to_dict(model).items() if not k.startswith(options)}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    norms = [
        layer_key(layer, name)
        for layer in range(model.num_layers)
        for name in (ATTENTION_NORM, MLP_NORM)
    ]
    for key in [*norms, FINAL_NORM]:
        digest.update(weights.tensor(key).to(torch.float32).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def describe(
    split: Split,
    maps: dict[int, NeuronMap],
    router: dict[str, Any],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Contents of construction.json; the neuron maps last, since they are long."""
    options = {name: getattr(split, name) for name in methods.METHODS[split.method].options}
    residual = {str(layer): map_.residual.tolist() for layer, map_ in maps.items()}
    return {
        "method": split.method,
        "seed": split.seed,
        "options": {**dict(sorted(options.items())), "expert_width": split.width},
        "complete": split.complete,
        "router": router,
        "source": source,
        **({"residual": residual} if split.num_residual else {}),
        "neurons": {str(layer): map_.experts.tolist() for layer, map_ in maps.items()},
    }


def recorded_neurons(construction: dict[str, Any]) -> dict[int, NeuronMap]:
    """The neuron map of each MoE layer that construction.json records."""
    residual = construction.get("residual", {})
    return {
        int(layer): NeuronMap(
            torch.tensor(experts), torch.tensor(residual.get(layer, []), dtype=torch.long)
        )
        for layer, experts in construction["neurons"].items()
    }
