"""The shape of a network: what a checkpoint's model.yaml holds, and the recipe's first section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.errors import UserError

LoraTarget = Literal["gate", "up", "down"]


@dataclass
class ModelConfig:
    """Shape of the network: LLaMA, and LLaMA-MoE where `num_experts` is set."""

    num_layers: int = 32
    """Decoder layers L."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 11008
    """Width d_h of a dense FFN."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); none: as many as query heads."""
    kv_channels: int | None = None
    """Width of a head; none: hidden_size / num_attention_heads."""
    vocab_size: int = 32000
    """Entries of the embedding."""
    max_position_embeddings: int = 4096
    """Longest sequence that the dense model was trained for."""
    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: float = 10000.0
    """RoPE theta."""
    rope_scaling_factor: float | None = None
    """Llama-3 RoPE scaling factor (low/high frequency factors 1 and 4, original length 8192); none:
    no scaling.
    """
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has weights of its own."""
    init_method_std: float = 0.02
    """Standard deviation of freshly initialised weights."""

    num_experts: int | None = None
    """Experts E of a MoE layer; none: a dense model."""
    moe_router_topk: int = 2
    """Experts k that a token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Width m of an expert; none: ffn_hidden_size / num_experts."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the always-on residual expert (all residual blocks together); none: there is
    none.
    """
    moe_shared_expert_gate: Literal["none", "xft"] = "none"
    """Weight of that expert: `none`: 1; `xft`: 1 - the largest routed probability, which the chosen
    experts share out.
    """
    moe_dense_first_layers: int = 0
    """How many of the first layers stay dense."""
    moe_dense_last_layers: int = 0
    """How many of the last layers stay dense."""
    moe_layer_freq: int | list[int] = 1
    """Which of the layers between are MoE layers: every n-th from layer 0, or a 1 or 0 for each
    layer.
    """
    moe_score_scale: float | list[float] = 1.0
    """Factor on the chosen experts' outputs (LLaMA-MoE: E/k), one number or one per layer."""
    moe_gate: Literal["linear", "mlp"] = "linear"
    """Router: `linear` [E, hidden], or LLaMA-MoE's `mlp` (linear, tanh, linear [E, E])."""
    lora_rank: int | None = None
    """Rank r of LoRA experts: adapters over one frozen FFN that a layer's experts share; none: each
    expert is an FFN of its own.
    """
    lora_alpha: float = 16.0
    """Adapters count alpha / r."""
    lora_targets: list[LoraTarget] = field(default_factory=lambda: ["gate", "up", "down"])
    """Matrices of the shared FFN that have adapters."""

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def expert_width(self) -> int:
        """m: width of one expert."""
        if self.num_experts is None:
            raise ValueError("a dense model has no experts")
        return self.moe_ffn_hidden_size or self.ffn_hidden_size // self.num_experts

    @property
    def lora_scale(self) -> float:
        """alpha / r; of a model with LoRA experts."""
        assert self.lora_rank is not None
        return self.lora_alpha / self.lora_rank

    @property
    def moe_layers(self) -> list[int]:
        """Indices (from 0) of the layers that are MoE layers."""
        if not self.is_moe:
            return []
        between = range(self.moe_dense_first_layers, self.num_layers - self.moe_dense_last_layers)
        freq = self.moe_layer_freq
        if isinstance(freq, list):
            return [layer for layer in between if freq[layer]]
        return [layer for layer in between if layer % freq == 0]

    def score_scale(self, layer: int) -> float:
        """Factor on expert outputs in layer `layer` (from 0)."""
        scale = self.moe_score_scale
        return scale[layer] if isinstance(scale, list) else scale

    def validate(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}",
                "set kv_channels",
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.kv_heads}"
            )
        if self.num_experts is None:
            if self.lora_rank is not None:
                raise UserError(
                    f"lora_rank={self.lora_rank} is of experts, and there are none",
                    "convert with --num-experts 1 to tune a dense model's FFNs by LoRA",
                )
            return
        if not 1 <= self.moe_router_topk <= self.num_experts:
            raise UserError(
                f"moe_router_topk={self.moe_router_topk} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.moe_ffn_hidden_size is None and self.ffn_hidden_size % self.num_experts:
            raise UserError(
                f"ffn_hidden_size={self.ffn_hidden_size} is not a multiple of "
                f"num_experts={self.num_experts}",
                "choose a divisor, or set moe_ffn_hidden_size",
            )
        freq = self.moe_layer_freq
        if freq < 1 if isinstance(freq, int) else sorted({0, 1, *freq}) != [0, 1]:
            raise UserError(
                f"moe_layer_freq={freq} is neither a number from 1 on nor a list of 0, 1"
            )
        if isinstance(freq, list) and len(freq) != self.num_layers:
            raise UserError(f"moe_layer_freq has {len(freq)} values for {self.num_layers} layers")
        if not self.moe_layers:
            raise UserError(
                f"moe_dense_first_layers={self.moe_dense_first_layers} and "
                f"moe_dense_last_layers={self.moe_dense_last_layers} leave no MoE layer of "
                f"{self.num_layers}"
            )
        if self.moe_shared_expert_gate == "xft" and (
            not self.moe_shared_expert_intermediate_size or self.moe_score_scale != 1.0
        ):
            raise UserError(
                "moe_shared_expert_gate=xft shares a weight of 1 out between a shared expert and "
                "the chosen ones",
                "set moe_shared_expert_intermediate_size, and leave moe_score_scale at 1",
            )
        if self.lora_rank is not None:
            self._validate_lora(self.lora_rank)
        if isinstance(self.moe_score_scale, list) and len(self.moe_score_scale) != self.num_layers:
            raise UserError(
                f"moe_score_scale has {len(self.moe_score_scale)} values for "
                f"{self.num_layers} layers"
            )

    def _validate_lora(self, rank: int) -> None:
        largest = min(self.hidden_size, self.ffn_hidden_size)
        if not 1 <= rank <= largest:
            raise UserError(
                f"lora_rank={rank} must lie between 1 and {largest}, the rank of a whole matrix"
            )
        if not self.lora_alpha > 0:
            raise UserError(f"lora_alpha={self.lora_alpha} must be above 0")
        targets = self.lora_targets
        if not targets or len(set(targets)) < len(targets):
            raise UserError(
                f"lora_targets={targets} are not different matrices", "name gate, up or down"
            )
        if self.expert_width != self.ffn_hidden_size:
            raise UserError(
                f"LoRA experts are as wide as the FFN that they share, {self.ffn_hidden_size}, "
                f"not {self.expert_width}",
                f"set moe_ffn_hidden_size to {self.ffn_hidden_size}",
            )
