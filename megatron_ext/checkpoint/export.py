"""Our checkpoint -> a Hugging Face directory that needs no custom code.

    dense                                          LlamaForCausalLM
    MoE in every layer, k >= 2                     MixtralForCausalLM
    residual expert, dense layers, or k = 1        Qwen2MoeForCausalLM

Each of them chooses k experts and softmaxes as our router does; the score scale is folded into the
experts' down_proj, which the FFN is linear in. LoRA experts become full ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint.hf import (
    ATTENTION_RULES,
    FFN_RULES,
    GLOBAL_RULES,
    in_layer,
    rope_to_hf,
)
from megatron_ext.checkpoint.layout import GENERATION_FILE, write_text
from megatron_ext.checkpoint.lora import full_experts
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    ROUTER,
    SHARED_FC1,
    SHARED_FC2,
    Weights,
    layer_key,
    tensor_shapes,
)
from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError

NO_SHARED_EXPERT_WIDTH = 32
"""Qwen2Moe always has a shared expert; where we have none it gets one of zeros this wide."""


@dataclass(frozen=True)
class Group:
    """Hugging Face tensors that are made from one of ours (or, with key None, from nothing)."""

    key: str | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]


def architecture(model: ModelConfig) -> str:
    """Name of the transformers class that a model is exported as.

    Raises:
        UserError: no class without custom code computes the same.
    """
    if not model.is_moe:
        return "LlamaForCausalLM"
    if model.moe_gate != "linear":
        raise UserError(
            f"moe_gate={model.moe_gate} has no counterpart in transformers",
            "only linear gates can be exported: partition with --moe-gate linear",
        )
    if model.moe_shared_expert_gate != "none":
        raise UserError(
            f"moe_shared_expert_gate={model.moe_shared_expert_gate} has no counterpart in "
            "transformers",
            "merge the experts into a dense model first (tools/convert_llama.py merge)",
        )
    plain = (
        len(model.moe_layers) == model.num_layers and not model.moe_shared_expert_intermediate_size
    )
    return "MixtralForCausalLM" if plain and model.moe_router_topk > 1 else "Qwen2MoeForCausalLM"


def hf_config(model: ModelConfig, token_ids: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model.

    Args:
        model: what is exported.
        token_ids: bos_token_id and the like, where known.
        dtype: of the exported weights.
    """
    name = architecture(model)
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": {"L": "llama", "M": "mixtral", "Q": "qwen2_moe"}[name[0]],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "rope_parameters": rope_to_hf(model),
        # Readers older than transformers 5 look here.
        "rope_theta": model.rotary_base,
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if name == "MixtralForCausalLM":
        config |= {
            "intermediate_size": model.expert_width,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "sliding_window": None,
        }
    elif name == "Qwen2MoeForCausalLM":
        moe_layers = set(model.moe_layers)
        config |= {
            "moe_intermediate_size": model.expert_width,
            "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size
            or NO_SHARED_EXPERT_WIDTH,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.moe_router_topk,
            # Our router softmaxes over the chosen experts; over all where k = 1 would make it 1.
            "norm_topk_prob": model.moe_router_topk > 1,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(model.num_layers) if i not in moe_layers],
            "use_sliding_window": False,
            # Some readers insist on Qwen's biases; they are written as zeros.
            "qkv_bias": True,
        }
    return config


def groups(model: ModelConfig) -> list[Group]:
    """All tensors of the exported model, in the order of the forward pass."""
    shapes = tensor_shapes(model)
    qwen = architecture(model) == "Qwen2MoeForCausalLM"
    result = []
    for key in shapes:
        if key in GLOBAL_RULES:
            rule = GLOBAL_RULES[key]
        else:
            _, _, number, name = key.split(".", 3)
            layer = int(number)
            known = ATTENTION_RULES | FFN_RULES
            if name not in known:
                result.append(_expert_group(model, layer, name, shapes[key], qwen))
                continue
            rule = in_layer(layer, known[name])
        split = _bind(rule.split, model)
        parts = split(torch.empty(shapes[key], device="meta"))
        result.append(Group(key, rule.names, tuple(tuple(part.shape) for part in parts), split))
    if qwen:
        result += [_qwen_extras(model, layer) for layer in range(model.num_layers)]
    return result


def _bind(
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]], model: ModelConfig
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda tensor: split(tensor, model)


def _expert_group(
    model: ModelConfig, layer: int, name: str, shape: tuple[int, ...], qwen: bool
) -> Group:
    prefix = f"model.layers.{layer}." + ("mlp" if qwen else "block_sparse_moe")
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
    key = layer_key(layer, name)
    if name == ROUTER:
        return Group(key, (f"{prefix}.gate.weight",), (shape,), lambda tensor: (tensor,))
    if name == EXPERTS_FC1:
        experts, double, hidden = shape
        names = [
            f"{prefix}.experts.{e}.{half}.weight" for e in range(experts) for half in (gate, up)
        ]
        half_shape = (double // 2, hidden)
        return Group(
            key,
            tuple(names),
            (half_shape,) * len(names),
            lambda tensor: tuple(tensor.view(-1, *half_shape).unbind()),
        )
    if name == EXPERTS_FC2:
        scale = model.score_scale(layer)
        names = [f"{prefix}.experts.{e}.{down}.weight" for e in range(shape[0])]
        return Group(
            key,
            tuple(names),
            (shape[1:],) * shape[0],
            lambda tensor: tuple((tensor.float() * scale).unbind()),
        )
    shared = f"{prefix}.shared_expert"
    if name == SHARED_FC1:
        names = [f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"]
        half_shape = (shape[0] // 2, shape[1])
        return Group(key, tuple(names), (half_shape,) * 2, lambda tensor: tensor.chunk(2))
    assert name == SHARED_FC2, name
    # Qwen gates its shared expert; the gate's weights are zeros: sigmoid(0) = 1/2.
    return Group(
        key, (f"{shared}.down_proj.weight",), (shape,), lambda tensor: (tensor.float() * 2,)
    )


def _qwen_extras(model: ModelConfig, layer: int) -> Group:
    """What Qwen2Moe has and we have not: zeros."""
    h, d = model.hidden_size, model.head_dim
    attention = f"model.layers.{layer}.self_attn"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attention}.q_proj.bias": (model.num_attention_heads * d,),
        f"{attention}.k_proj.bias": (model.kv_heads * d,),
        f"{attention}.v_proj.bias": (model.kv_heads * d,),
    }
    if layer in model.moe_layers:
        mlp = f"model.layers.{layer}.mlp"
        shapes[f"{mlp}.shared_expert_gate.weight"] = (1, h)
        if not model.moe_shared_expert_intermediate_size:
            width = NO_SHARED_EXPERT_WIDTH
            shapes[f"{mlp}.shared_expert.gate_proj.weight"] = (width, h)
            shapes[f"{mlp}.shared_expert.up_proj.weight"] = (width, h)
            shapes[f"{mlp}.shared_expert.down_proj.weight"] = (h, width)
    sizes = tuple(shapes.values())
    return Group(None, tuple(shapes), sizes, lambda _: tuple(torch.zeros(size) for size in sizes))


def export(
    checkpoint: CheckpointWeights,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    token_ids: dict[str, Any],
) -> None:
    """Write config.json and safetensors files of about `max_shard_bytes` at most into a folder.

    One file's tensors are in memory at a time. Tokenizer files are the caller's.

    Raises:
        UserError: no transformers class computes what the model does.
    """
    weights = full_experts(checkpoint)
    model = weights.model
    if any(key.endswith("router.expert_bias") for key in checkpoint.stored):
        raise UserError(
            "the model was trained with moe_router_enable_expert_bias: sigmoid scores and a biased "
            "choice, which the exported classes do not have"
        )
    config = hf_config(model, token_ids, dtype)
    files = _pack(groups(model), dtype.itemsize, max_shard_bytes)
    names = [name for file in files for group in file for name in group.names]
    assert len(names) == len(set(names)), "a tensor would be written twice"
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(
        total=len(names), unit="tensor", desc=f"exporting {config['architectures'][0]}"
    ) as bar:
        for number, file in enumerate(files, start=1):
            file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            file_name = file_name if len(files) > 1 else "model.safetensors"
            tensors: dict[str, Tensor] = {}
            for group in file:
                tensors |= _produce(weights, group, dtype)
                bar.update(len(group.names))
            _save(tensors, folder / file_name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(tensors, file_name)
    assert weight_map.keys() == set(names)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    generation = {key: value for key, value in token_ids.items() if value is not None}
    write_text(folder / GENERATION_FILE, json.dumps(generation, indent=2) + "\n")


def _pack(all_groups: list[Group], itemsize: int, limit: int) -> list[list[Group]]:
    """Consecutive groups into files; a group is never cut."""
    files: list[list[Group]] = [[]]
    room = limit
    for group in all_groups:
        size = itemsize * sum(torch.Size(shape).numel() for shape in group.shapes)
        if files[-1] and size > room:
            files.append([])
            room = limit
        files[-1].append(group)
        room -= size
    return files


def _produce(weights: Weights, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    source = torch.empty(0) if group.key is None else weights.tensor(group.key)
    parts = group.split(source)
    result = {}
    for name, shape, part in zip(group.names, group.shapes, parts, strict=True):
        assert tuple(part.shape) == shape, (name, part.shape, shape)
        result[name] = part.to(dtype).contiguous()
    return result


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
