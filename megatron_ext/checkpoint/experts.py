"""A dense model seen as a Mixture of Experts, layer by layer, with neither of them in memory."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.checkpoint.tensors import (
    ATTENTION_NORM,
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    ROUTER,
    ROUTER_OUT,
    Weights,
    layer_key,
    tensor_shapes,
)
from megatron_ext.config import ModelConfig
from megatron_ext.construction import partition
from megatron_ext.errors import UserError
from megatron_ext.recipe import to_dict


class PartitionedWeights:
    """Experts cut out of dense weights by a neuron map for each layer (`tensors.Weights`)."""

    def __init__(
        self,
        dense: Weights,
        model: ModelConfig,
        neurons: dict[int, Tensor],
        seed: int,
        router_init: Literal["normal", "zero"] = "normal",
        router_std: float = 0.02,
    ) -> None:
        """Check that model and map fit the dense weights.

        Args:
            dense: what is cut.
            model: the MoE: the dense model's shape with experts added.
            neurons: map [E, m] for every MoE layer.
            seed: of the routers.
            router_init: how routers start.
            router_std: standard deviation of a normal start.

        Raises:
            UserError: `dense` has experts already.
        """
        if dense.model.is_moe:
            raise UserError("the source has experts already", "partition a dense model")
        model.validate()
        assert set(neurons) == set(model.moe_layers)
        self.dense, self.model, self.neurons, self.dtype = dense, model, neurons, dense.dtype
        self._seed, self._router_init, self._router_std = seed, router_init, router_std
        self._dense_keys = tensor_shapes(dense.model).keys()

    def tensor(self, key: str) -> Tensor:
        if key in self._dense_keys:
            return self.dense.tensor(key)
        _, _, number, name = key.split(".", 3)
        layer = int(number)
        if name == EXPERTS_FC1:
            return partition.slice_fc1(*self.dense.gate_up(layer), self.neurons[layer])
        if name == EXPERTS_FC2:
            return partition.slice_fc2(
                self.dense.tensor(layer_key(layer, FC2)), self.neurons[layer]
            )
        model = self.model
        assert model.num_experts is not None
        weight, out = partition.router_weights(
            model.num_experts,
            model.hidden_size,
            model.moe_gate,
            self._router_init,
            self._router_std,
            self._seed,
            layer,
        )
        if name == ROUTER:
            return weight
        assert name == ROUTER_OUT and out is not None, key
        return out

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.dense.gate_up(layer)


def fingerprint(weights: Weights) -> str:
    """Names a model by its shape and the weights of its norms: the same for every file format."""
    model = weights.model
    digest = hashlib.sha256(json.dumps(to_dict(model), sort_keys=True).encode())
    norms = [
        layer_key(layer, name)
        for layer in range(model.num_layers)
        for name in (ATTENTION_NORM, MLP_NORM)
    ]
    for key in [*norms, FINAL_NORM]:
        digest.update(weights.tensor(key).to(torch.float32).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def describe(
    method: str,
    seed: int,
    neurons: dict[int, Tensor],
    router: dict[str, Any],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Contents of construction.json; the neuron map last, since it is long."""
    return {
        "method": method,
        "seed": seed,
        "router": router,
        "source": source,
        "neurons": {str(layer): map_.tolist() for layer, map_ in neurons.items()},
    }


def recorded_neurons(construction: dict[str, Any]) -> dict[int, Tensor]:
    """The neuron map [E, m] of each MoE layer that construction.json records."""
    return {int(layer): torch.tensor(map_) for layer, map_ in construction["neurons"].items()}
