"""What a run uses of its GPU: precision, fused kernels and fp8, by GPU kind and what is installed.

Nothing here has been run on a GPU (docs/gpu.md). CUDA graphs stay off: a MoE's shapes change with
its routing.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.platform import Platform
from megatron_ext.versions import installed

BF16_CAPABILITY = (8, 0)
"""A100 and newer."""

FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""What TransformerEngine's recipes need: Ada and H100; H100; B200."""


def uses_bf16(run: RunConfig, platform: Platform) -> bool:
    """Whether weights are bf16 (with fp32 in the optimizer)."""
    if run.training.precision == "auto":
        return platform.is_cuda and not _older(platform, BF16_CAPABILITY)
    return run.training.precision == "bf16"


def _older(platform: Platform, needed: tuple[int, int]) -> bool:
    return platform.capability is not None and platform.capability < needed


def kernel_values(run: RunConfig, platform: Platform) -> dict[str, Any]:
    """The part of megatron-core's TransformerConfig that chooses kernels."""
    fused = platform.transformer_impl == "transformer_engine"
    values: dict[str, Any] = dict(
        bf16=uses_bf16(run, platform),
        # One kernel for the rotation, SwiGLU (with an expert's weight), the residual sum, and the
        # loss without a second copy of the logits. On CPU ours do this, or it does not matter.
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        # (megatron-core's fused loss rounds the logits' gradient to bf16 whatever they are.)
        cross_entropy_loss_fusion=fused and uses_bf16(run, platform),
        # Apex' extension for the output layer; TransformerEngine has its own, under the same name.
        gradient_accumulation_fusion=fused
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )
    if run.model.is_moe:
        values |= dict(
            moe_grouped_gemm=fused,
            moe_permute_fusion=fused,
            moe_shared_expert_overlap=fused and _overlaps_shared_expert(run),
        )
    if run.training.fp8 != "none":
        values |= dict(fp8="hybrid", fp8_recipe=run.training.fp8)
        if run.training.fp8 == "delayed":
            values |= dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return values


def _overlaps_shared_expert(run: RunConfig) -> bool:
    """Whether the shared expert is computed while tokens travel. XFT weighs its output first."""
    return (
        run.model.moe_shared_expert_intermediate_size is not None
        and run.model.moe_shared_expert_gate == "none"
        and run.parallel.moe_token_dispatcher_type == "alltoall"
    )


def check_kernels(run: RunConfig, platform: Platform) -> None:
    """What this machine cannot do, before a process group is made.

    Raises:
        UserError: bf16 or fp8 on a device without it, or a sharded optimizer that could not be
            resumed.
    """
    found = ".".join(map(str, platform.capability or ()))
    if uses_bf16(run, platform) and _older(platform, BF16_CAPABILITY):
        raise UserError(
            f"precision=bf16 on a GPU of capability {found}, which has no bf16",
            "use precision=fp32",
        )
    fp8 = run.training.fp8
    if fp8 != "none":
        needed = FP8_CAPABILITY[fp8]
        if platform.transformer_impl != "transformer_engine":
            raise UserError(
                f"fp8={fp8} needs TransformerEngine's layers; these are "
                f"{platform.transformer_impl} ones on {'a GPU' if platform.is_cuda else 'a CPU'}",
                "leave fp8 at none",
            )
        if _older(platform, needed):
            raise UserError(
                f"fp8={fp8} needs capability {'.'.join(map(str, needed))}; this GPU has {found}",
                "A100 has no fp8; H100 has delayed, tensorwise and blockwise",
            )
    sharded = run.parallel.use_distributed_optimizer and platform.is_cuda
    if sharded and not (installed("transformer-engine") or installed("apex")):
        raise UserError(
            "use_distributed_optimizer=true without TransformerEngine or Apex: its state could not "
            "be restored",
            "pip install 'megatron-llama-moe[gpu]', or leave it unset",
        )
