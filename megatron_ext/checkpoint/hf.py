"""Hugging Face LLaMA <-> our layout: configuration and table of tensors, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.layout import MODEL_FILE, PathLike
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.sources import GgufSource, SafetensorsSource, Source
from megatron_ext.checkpoint.tensors import (
    ATTENTION_NORM,
    ATTENTION_OUT,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    OUTPUT,
    QKV,
    Weights,
    layer_key,
    merge_qkv,
    split_qkv,
    tensor_shapes,
)
from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError

CONFIG_CLASSES = {"LlamaForCausalLM": "LlamaConfig", "MistralForCausalLM": "MistralConfig"}
# megatron-core's Llama-3 RoPE scaling has these built in; the factor alone can be chosen.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the Hugging Face tensors that it is made of."""

    names: tuple[str, ...]
    merge: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]


def _same(name: str) -> Rule:
    return Rule((name,), lambda parts, model: parts[0], lambda tensor, model: (tensor,))


GLOBAL_RULES = {
    EMBEDDING: _same("model.embed_tokens.weight"),
    FINAL_NORM: _same("model.norm.weight"),
    OUTPUT: _same("lm_head.weight"),
}
ATTENTION_RULES = {
    ATTENTION_NORM: _same("input_layernorm.weight"),
    QKV: Rule(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        lambda parts, model: merge_qkv(parts[0], parts[1], parts[2], model),
        split_qkv,
    ),
    ATTENTION_OUT: _same("self_attn.o_proj.weight"),
    MLP_NORM: _same("post_attention_layernorm.weight"),
}
FFN_RULES = {
    FC1: Rule(
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        lambda parts, model: torch.cat(parts),
        lambda tensor, model: tensor.chunk(2),
    ),
    FC2: _same("mlp.down_proj.weight"),
}
LAYER_RULES = ATTENTION_RULES | FFN_RULES
READ_AHEAD = 4
"""Tensors; every second or third is large."""


def in_layer(layer: int, rule: Rule) -> Rule:
    """A layer's rule with the full Hugging Face names."""
    names = tuple(f"model.layers.{layer}.{name}" for name in rule.names)
    return Rule(names, rule.merge, rule.split)


def dense_rules(model: ModelConfig) -> dict[str, Rule]:
    """The rule of every tensor of a dense model."""
    rules = {EMBEDDING: GLOBAL_RULES[EMBEDDING]}
    for layer in range(model.num_layers):
        rules |= {layer_key(layer, key): in_layer(layer, rule) for key, rule in LAYER_RULES.items()}
    rules[FINAL_NORM] = GLOBAL_RULES[FINAL_NORM]
    if model.untie_embeddings_and_output_weights:
        rules[OUTPUT] = GLOBAL_RULES[OUTPUT]
    return rules


class HfWeights:
    """A dense LLaMA of Hugging Face or llama.cpp in our layout (`tensors.Weights`)."""

    def __init__(self, source: Source, read_ahead: int = READ_AHEAD) -> None:
        """Check that the source holds exactly the tensors of its configuration.

        Args:
            source: the tensors.
            read_ahead: how many tensors to read in advance for who asks for them in order.

        Raises:
            UserError: another architecture; missing, unknown or misshapen tensors.
        """
        self.source = source
        self.model = model_from_hf(source.config)
        self.dtype = source.dtype
        self._rules = dense_rules(self.model)
        self._order = list(self._rules)
        self._last = -1  # place of the tensor that was asked for last
        self._in_order = 0  # how many have followed their predecessor
        self._read_ahead = read_ahead
        needed = {name for rule in self._rules.values() for name in rule.names}
        # Buffers of old files, and the copy of tied embeddings that some tools store.
        ignored = {name for name in source.names if name.endswith("rotary_emb.inv_freq")}
        if not self.model.untie_embeddings_and_output_weights:
            ignored.add("lm_head.weight")
        missing, unknown = needed - source.names, source.names - needed - ignored
        if missing:
            raise UserError(f"the source lacks {_some(missing)}", "are all its files there?")
        if unknown:
            raise UserError(f"the source holds {_some(unknown)}, which a LLaMA has not")
        self._check_shapes()

    def _check_shapes(self) -> None:
        for key, shape in tensor_shapes(self.model).items():
            rule = self._rules[key]
            parts = rule.split(torch.empty(shape, device="meta"), self.model)
            for name, part in zip(rule.names, parts, strict=True):
                if self.source.shape(name) != tuple(part.shape):
                    raise UserError(
                        f"{name} has shape {list(self.source.shape(name))}, "
                        f"config.json makes it {list(part.shape)}",
                        "are config.json and the weights of the same model?",
                    )

    def tensor(self, key: str) -> Tensor:
        return self._rules[key].merge(self._parts(key), self.model)

    def gate_up(self, layer: int) -> tuple[Tensor, Tensor]:
        gate, up = self._parts(layer_key(layer, FC1))
        return gate, up

    def _parts(self, key: str) -> tuple[Tensor, ...]:
        place = self._order.index(key)
        names = self._rules[key].names
        # As the kernel does it with files: the longer the order has been kept, the more.
        self._in_order = self._in_order + 1 if place == self._last + 1 else 0
        self._last = place
        ahead = min(self._in_order, self._read_ahead)
        following = self._order[place + 1 : place + 1 + ahead]
        self.source.prefetch(
            [*names, *(name for other in following for name in self._rules[other].names)]
        )
        return tuple(self.source.tensor(name) for name in names)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more tensors"


def open_weights(path: PathLike, read_ahead: int = READ_AHEAD) -> Weights:
    """Weights of what lies at `path`: our checkpoint or run, a Hugging Face directory, a GGUF file.

    Args:
        path: directory or file.
        read_ahead: see HfWeights.

    Raises:
        UserError: none of these, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / MODEL_FILE).is_file():
        return CheckpointWeights(path)
    if path.is_dir():
        return HfWeights(SafetensorsSource(path), read_ahead)
    return HfWeights(GgufSource(path), read_ahead)


def model_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face configuration.

    Args:
        config: contents of config.json, in the form of any transformers version.

    Raises:
        UserError: an architecture or an option that our LLaMA does not have.
    """
    import transformers

    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if architecture not in CONFIG_CLASSES:
        raise UserError(
            f"architecture {architecture} is not a dense LLaMA",
            f"known: {', '.join(CONFIG_CLASSES)}",
        )
    hf = getattr(transformers, CONFIG_CLASSES[architecture]).from_dict(config)
    for option in ("attention_bias", "mlp_bias"):
        if getattr(hf, option, False):
            raise UserError(f"{option}=true: biases are not supported", "use a model without them")
    if hf.hidden_act != "silu":
        raise UserError(f"hidden_act={hf.hidden_act} is not supported: a LLaMA has silu")
    window = getattr(hf, "sliding_window", None)
    if window is not None and window < hf.max_position_embeddings:
        raise UserError(
            f"sliding_window={window} is below max_position_embeddings="
            f"{hf.max_position_embeddings}: windowed attention is not supported",
            f"set max_position_embeddings to {window} in config.json to train within the window",
        )
    rope = dict(hf.rope_parameters)
    model = ModelConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        norm_epsilon=hf.rms_norm_eps,
        rotary_base=float(rope["rope_theta"]),
        rope_scaling_factor=_rope_scaling(rope),
        untie_embeddings_and_output_weights=not hf.tie_word_embeddings,
        init_method_std=hf.initializer_range,
    )
    model.validate()
    return model


def _rope_scaling(rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rope_type={kind} is not supported", "known: default, llama3")
    for name, value in LLAMA3_ROPE.items():
        if rope.get(name) != value:
            raise UserError(
                f"{name}={rope.get(name)} of the Llama-3 RoPE scaling is not supported",
                f"megatron-core has {value} built in",
            )
    return float(rope["factor"])


def rope_to_hf(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of a Hugging Face configuration."""
    if model.rope_scaling_factor is None:
        return {"rope_type": "default", "rope_theta": model.rotary_base}
    return {
        "rope_type": "llama3",
        "rope_theta": model.rotary_base,
        "factor": model.rope_scaling_factor,
        **LLAMA3_ROPE,
    }
