"""The tensors of a checkpoint: their keys, their shapes, and what can provide them.

h hidden size, d_h dense FFN width, E experts, m expert width, q query heads, g key/value heads,
d head width. Every decoder layer has its own keys, so that layers may differ and any pipeline can
read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.model_config import LoraTarget

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"

ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_weight"
QKV = "self_attention.linear_qkv.weight"
ATTENTION_OUT = "self_attention.linear_proj.weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"
ROUTER = "mlp.router.weight"
ROUTER_OUT = "mlp.router.gate_out"
EXPERTS_FC1 = "mlp.experts.experts.linear_fc1.weight"
EXPERTS_FC2 = "mlp.experts.experts.linear_fc2.weight"
SHARED_FC1 = "mlp.shared_experts.linear_fc1.weight"
SHARED_FC2 = "mlp.shared_experts.linear_fc2.weight"


def lora_names(targets: Iterable[LoraTarget]) -> dict[LoraTarget, tuple[str, str]]:
    """Names of each target's factors A [E, r, in] and B [E, out, r], beside FC1 and FC2, which the
    experts share.
    """
    prefix = "mlp.experts.experts.lora"
    return {target: (f"{prefix}_{target}_a", f"{prefix}_{target}_b") for target in targets}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK = 1 << 17
_UNSIGNED = {2: torch.uint16, 4: torch.uint32}
_EXPONENTS = {torch.float16: 0xF800, torch.bfloat16: 0xFF00, torch.float32: 0xFF000000}


class Weights(Protocol):
    """The weights of a model in our layout, one tensor at a time."""

    model: ModelConfig
    dtype: torch.dtype

    def tensor(self, key: str) -> Tensor:
        """The whole tensor of a key of `tensor_shapes(self.model)`."""

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        """The halves [d_h, h] of a dense layer's FC1, without joining them first."""


def layer_key(layer: int, name: str) -> str:
    """Key of a tensor of decoder layer `layer` (from 0)."""
    return f"decoder.layers.{layer}.{name}"


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a model and its shape, in the order of the forward pass."""
    h, d = model.hidden_size, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, h)}
    for layer in range(model.num_layers):
        shapes |= {
            layer_key(layer, name): shape for name, shape in _layer_shapes(model, layer, h, d)
        }
    shapes[FINAL_NORM] = (h,)
    if model.untie_embeddings_and_output_weights:
        shapes[OUTPUT] = (model.vocab_size, h)
    return shapes


def _layer_shapes(
    model: ModelConfig, layer: int, h: int, d: int
) -> list[tuple[str, tuple[int, ...]]]:
    heads, groups = model.num_attention_heads, model.kv_heads
    shapes: list[tuple[str, tuple[int, ...]]] = [
        (ATTENTION_NORM, (h,)),
        (QKV, ((heads + 2 * groups) * d, h)),
        (ATTENTION_OUT, (h, heads * d)),
        (MLP_NORM, (h,)),
    ]
    if layer not in model.moe_layers:
        f = model.ffn_hidden_size
        return [*shapes, (FC1, (2 * f, h)), (FC2, (h, f))]
    assert model.num_experts is not None
    experts, m = model.num_experts, model.expert_width
    shapes.append((ROUTER, (experts, h)))
    if model.moe_gate == "mlp":
        shapes.append((ROUTER_OUT, (experts, experts)))
    if model.lora_rank is None:
        shapes += [(EXPERTS_FC1, (experts, 2 * m, h)), (EXPERTS_FC2, (experts, h, m))]
    else:
        shapes += [(FC1, (2 * m, h)), (FC2, (h, m))]
        for target, (a, b) in lora_names(model.lora_targets).items():
            into, out = (m, h) if target == "down" else (h, m)
            shapes += [(a, (experts, model.lora_rank, into)), (b, (experts, out, model.lora_rank))]
    if model.moe_shared_expert_intermediate_size:
        r = model.moe_shared_expert_intermediate_size
        shapes += [(SHARED_FC1, (2 * r, h)), (SHARED_FC2, (h, r))]
    return shapes


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    """q [q d, h], k, v [g d, h] -> [(q + 2 g) d, h]: by group: queries, key, value."""
    g, d, h = model.kv_heads, model.head_dim, model.hidden_size
    return torch.cat([part.view(g, -1, d, h) for part in (q, k, v)], dim=1).reshape(-1, h)


def split_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `merge_qkv`."""
    g, d, h = model.kv_heads, model.head_dim, model.hidden_size
    per_group = model.num_attention_heads // g
    parts = qkv.view(g, per_group + 2, d, h).split((per_group, 1, 1), dim=1)
    q, k, v = (part.reshape(-1, h) for part in parts)
    return q, k, v


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a UserError where a tensor holds NaN or infinity."""
    if is_finite(tensor):
        return
    bad = int((~tensor.isfinite()).sum())
    raise UserError(
        f"tensor {name} holds {bad} values that are NaN or infinite",
        "the file is damaged or the model diverged; use another checkpoint",
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass over memory."""
    exponent = _EXPONENTS.get(tensor.dtype)
    if exponent is None or not tensor.is_contiguous():
        return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))  # NaN propagates
    # NaN and infinity have all bits of the exponent set. Shifting the sign out leaves them above
    # all other numbers. Blocks stay in the cache.
    bits = tensor.reshape(-1).view(_UNSIGNED[tensor.itemsize]).numpy()
    block = np.empty(min(len(bits), _BLOCK), bits.dtype)
    for start in range(0, len(bits), _BLOCK):
        part = bits[start : start + _BLOCK]
        if np.left_shift(part, 1, out=block[: len(part)]).max() >= exponent:
            return False
    return True


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """(total, activated per token) parameters of a model, from the shapes of its tensors."""
    total = active = 0
    for key, shape in tensor_shapes(model).items():
        size = 1
        for extent in shape:
            size *= extent
        total += size
        experts = ".experts." in key and model.num_experts
        active += size * model.moe_router_topk // experts if experts else size
    return total, active
