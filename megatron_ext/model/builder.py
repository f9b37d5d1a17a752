"""From a RunConfig to a megatron-core model: the only file that names megatron-core's layer
specs.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from megatron_ext.config import ModelConfig, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.model.attention import SdpaAttention
from megatron_ext.model.experts import LocalExperts, mark_expert_parameter
from megatron_ext.model.head import LlamaMoeModel
from megatron_ext.model.kernels import kernel_values, uses_bf16
from megatron_ext.model.lora import LoraExperts
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.packed import attends_to_packed_rows
from megatron_ext.model.router import LlamaMoeRouter
from megatron_ext.model.xft import XftMoELayer
from megatron_ext.platform import Platform
from megatron_ext.random_keys import mixed_seed


@dataclass
class LlamaMoeTransformerConfig(TransformerConfig):
    """megatron-core's configuration, with what LLaMA-MoE adds."""

    moe_gate: str = "linear"
    moe_gate_noise: bool = False
    moe_balance_loss: str = "none"
    moe_cv2_coeff: float = 0.0
    moe_score_scale: float | list[float] = 1.0
    moe_xft_routing: bool = False
    lora_rank: int | None = None
    lora_scale: float = 1.0
    lora_targets: list[str] = field(default_factory=list)
    initialisation_seed: int = 0

    def score_scale(self, layer: int) -> float:
        scale = self.moe_score_scale
        return scale[layer] if isinstance(scale, list) else scale


def transformer_config(run: RunConfig, platform: Platform) -> LlamaMoeTransformerConfig:
    """megatron-core's configuration of a run."""
    model, parallel, training = run.model, run.parallel, run.training
    dtype = torch.bfloat16 if uses_bf16(run, platform) else torch.float32
    values: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=functools.partial(_normal_, std=model.init_method_std),
        output_layer_init_method=functools.partial(_normal_, std=model.init_method_std),
        init_method_std=model.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tp,
        sequence_parallel=parallel.uses_sequence_parallel,
        # A step's gradient is the sum over its trained tokens divided by their number, on any grid.
        calculate_per_token_loss=True,
        # gloo still reads a tensor that is being sent.
        deallocate_pipeline_outputs=platform.is_cuda,
        # With two stages the neighbours on both sides are one rank: only the overlapped form keeps
        # the messages of an interleaved schedule apart.
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        attention_softmax_in_fp32=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        transformer_impl=platform.transformer_impl,
        initialisation_seed=training.seed,
        recompute_granularity=training.recompute_granularity,
        recompute_method="uniform" if training.recompute_granularity == "full" else None,
        recompute_num_layers=training.recompute_num_layers
        if training.recompute_granularity == "full"
        else None,
    )
    values |= kernel_values(run, platform)
    if model.is_moe:
        values |= _moe_values(run)
    # CPU tensors are initialised by megatron-core's CPU path, which draws the whole matrix on every
    # rank and cuts out the rank's share: the weights do not depend on the grid.
    values["use_cpu_initialization"] = not platform.is_cuda
    return LlamaMoeTransformerConfig(**values)


def _moe_values(run: RunConfig) -> dict[str, Any]:
    model, router = run.model, run.router
    if router.moe_router_enable_expert_bias and model.moe_shared_expert_gate == "xft":
        raise UserError(
            "moe_router_enable_expert_bias scores experts by a sigmoid, "
            "moe_shared_expert_gate=xft by a softmax",
            "balance with moe_balance_loss",
        )
    core_loss = (
        router.moe_balance_loss if router.moe_balance_loss not in ("cv2", "none") else "none"
    )
    return dict(
        num_moe_experts=model.num_experts,
        moe_router_topk=model.moe_router_topk,
        moe_ffn_hidden_size=model.expert_width,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_layer_freq=[int(layer in model.moe_layers) for layer in range(model.num_layers)],
        moe_router_load_balancing_type=core_loss,
        moe_aux_loss_coeff=router.moe_aux_loss_coeff if core_loss != "none" else 0.0,
        moe_z_loss_coeff=router.moe_z_loss_coeff,
        moe_router_enable_expert_bias=router.moe_router_enable_expert_bias,
        moe_router_bias_update_rate=router.moe_router_bias_update_rate,
        moe_router_score_function="sigmoid" if router.moe_router_enable_expert_bias else "softmax",
        # With k = 1 a softmax over the one chosen logit is the constant 1 and teaches the router
        # nothing.
        moe_router_pre_softmax=model.moe_router_topk == 1,
        moe_router_dtype=router.moe_router_dtype,
        moe_token_dispatcher_type=run.parallel.moe_token_dispatcher_type,
        moe_gate=model.moe_gate,
        moe_gate_noise=router.moe_gate_noise,
        moe_balance_loss=router.moe_balance_loss,
        moe_cv2_coeff=router.moe_aux_loss_coeff,
        moe_score_scale=model.moe_score_scale,
        moe_xft_routing=model.moe_shared_expert_gate == "xft",
        **_lora_values(model),
    )


def _lora_values(model: ModelConfig) -> dict[str, Any]:
    if model.lora_rank is None:
        return {}
    return dict(
        lora_rank=model.lora_rank,
        lora_scale=model.lora_scale,
        lora_targets=model.lora_targets,
    )


class SeededLayer(TransformerLayer):
    """A decoder layer whose fresh weights depend on its number, not on the pipeline stage it is in.

    (On CPU, where whole matrices are drawn and then cut. On CUDA megatron-core draws from tracked
    generators per tensor-parallel rank.)
    """

    def __init__(self, config: Any, *args: Any, layer_number: int = 1, **kwargs: Any) -> None:
        if config.use_cpu_initialization and config.perform_initialization:
            offset = get_transformer_layer_offset(config, vp_stage=kwargs.get("vp_stage"))
            base = config.initialisation_seed
            torch.manual_seed(mixed_seed(base, offset + layer_number))
        super().__init__(config, *args, layer_number=layer_number, **kwargs)
        if config.moe_xft_routing and isinstance(self.mlp, MoELayer):
            # As a module of the spec, 0.16 does not recognise a subclass as a MoE layer.
            self.mlp.__class__ = XftMoELayer


def _normal_(tensor: torch.Tensor, std: float) -> torch.Tensor:
    return torch.nn.init.normal_(tensor, 0.0, std)


def layer_specs(
    config: LlamaMoeTransformerConfig, platform: Platform, vp_stage: int | None = None
) -> Any:
    """megatron-core's decoder block of this pipeline stage, with our router, and our modules in the
    local backend.
    """
    local = platform.transformer_impl == "local"
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=not local,
        normalization="RMSNorm",
        vp_stage=vp_stage,
    )
    block = copy.deepcopy(block)
    if local:
        block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.module = SeededLayer
        parts = layer.submodules
        if local:
            parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
            parts.self_attention.submodules.core_attention = SdpaAttention
        else:
            attention = parts.self_attention.submodules
            attention.core_attention = attends_to_packed_rows(attention.core_attention)
        moe = _moe_submodules(parts.mlp)
        if moe is not None:
            moe.router = LlamaMoeRouter
            # The local layers' name for this weight, so that a checkpoint serves both backends.
            parts.sharded_state_dict_keys_map = {
                **parts.sharded_state_dict_keys_map,
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            }
            if config.lora_rank is not None:
                moe.experts = LoraExperts
            elif local:
                moe.experts = LocalExperts
    return block


def _moe_submodules(mlp: Any) -> Any:
    """MoESubmodules of a layer's MLP spec (0.16: a ModuleSpec, 0.19: a partial), or None for a
    dense MLP.
    """
    if isinstance(mlp, ModuleSpec):
        return mlp.submodules if mlp.module is MoELayer else None
    return mlp.keywords["submodules"] if mlp.func is MoELayer else None


def build_model(
    run: RunConfig,
    platform: Platform,
    config: LlamaMoeTransformerConfig | None = None,
    vp_stage: int | None = None,
) -> LlamaMoeModel:
    """This rank's part of the model, on the platform's device, in the run's precision.

    `parallel_state` must be initialised. Weights come from the seeded generators of megatron-core
    and do not depend on the grid.
    """
    config = config or transformer_config(run, platform)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = LlamaMoeModel(
        config=config,
        transformer_layer_spec=layer_specs(config, platform, vp_stage),
        vocab_size=run.model.vocab_size,
        max_sequence_length=run.model.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
        rope_scaling=run.model.rope_scaling_factor is not None,
        rope_scaling_factor=run.model.rope_scaling_factor or 1.0,
        vp_stage=vp_stage,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            mark_expert_parameter(parameter)
    return model.to(platform.device)


def routers(model: Any) -> list[LlamaMoeRouter]:
    """The routers of this rank's part of the model, in layer order."""
    return [module for module in model.modules() if isinstance(module, LlamaMoeRouter)]
