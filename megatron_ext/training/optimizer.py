"""Model chunks in megatron-core's DDP, its optimizer, and LLaMA-MoE's learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config import RunConfig
from megatron_ext.model.builder import build_model, transformer_config
from megatron_ext.platform import Platform, use_fused_adam
from megatron_ext.training.freeze import freeze
from megatron_ext.versions import installed


class ParamScheduler(OptimizerParamScheduler):
    """megatron-core's scheduler, with the cosine of LLaMA-MoE: cut off at the floor, not stretched
    to end there.

    lr(p) = max(min_lr, max_lr (1 + cos(pi p)) / 2), p the share of decay steps done after the
    warm-up.
    """

    def get_lr(self, param_group: dict) -> float:
        if self.lr_decay_style != "cosine" or self.num_steps <= self.lr_warmup_steps:
            return super().get_lr(param_group)
        max_lr = param_group.get("max_lr") or self.max_lr
        min_lr = param_group.get("min_lr") or self.min_lr
        done = (self.num_steps - self.lr_warmup_steps) / (
            self.lr_decay_steps - self.lr_warmup_steps
        )
        return max(min_lr, max_lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


def uses_distributed_optimizer(run: RunConfig, platform: Platform) -> bool:
    """Whether optimizer state is sharded over data parallelism.

    Without TransformerEngine or Apex, megatron-core's sharded optimizer cannot be saved and
    restored correctly.
    """
    chosen = run.parallel.use_distributed_optimizer
    able = platform.is_cuda and (installed("transformer-engine") or installed("apex")) is not None
    return able if chosen is None else chosen and platform.is_cuda


def build_training_model(run: RunConfig, platform: Platform) -> list[Any]:
    """This rank's model chunks, wrapped in DDP, in training mode."""
    config = transformer_config(run, platform)
    chunks = run.parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(chunks)) if chunks else [None]
    distributed = uses_distributed_optimizer(run, platform)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather and distributed,
        use_distributed_optimizer=distributed,
        check_for_nan_in_grad=False,
    )
    model = []
    for stage in stages:
        chunk = build_model(run, platform, config, vp_stage=stage)
        freeze(chunk, run.training.freeze)
        if config.bf16:
            from megatron.core.transformer.module import Float16Module

            chunk = Float16Module(config, chunk)
        model.append(
            DistributedDataParallel(
                config, ddp, chunk, disable_bucketing=stage is not None and stage > 0
            )
        )
    for chunk in model:
        chunk.broadcast_params()
        chunk.train()
        for parameter in chunk.parameters():
            # megatron-core's overlapped reduction wants to see every gradient itself.
            parameter.fuses_gradient = not ddp.overlap_grad_reduce
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        config.no_sync_func = (
            [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
        )
    return model


def build_optimizer(
    run: RunConfig, platform: Platform, model: list[Any]
) -> tuple[Any, ParamScheduler]:
    """The optimizer of all chunks, and its scheduler (one step per optimizer step)."""
    settings = run.optimizer
    bf16 = next(model[0].parameters()).dtype == torch.bfloat16
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=uses_distributed_optimizer(run, platform),
    )
    optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=platform.is_cuda)
    if not platform.is_cuda:
        use_fused_adam(optimizer)
    # The multiplier form of the grad scaler is 1 here; megatron-core wants the function on the
    # config.
    model[0].config.grad_scale_func = optimizer.scale_loss
    decay = settings.lr_decay_iters or run.training.train_iters
    warmup = min(settings.lr_warmup_iters, max(decay - 1, 0))
    scheduler = ParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=min(settings.min_lr, settings.lr),
        lr_warmup_steps=warmup,
        lr_decay_steps=max(decay, 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=max(decay // 10, 1),
        lr_wsd_decay_style="cosine",
    )
    # Step n trains with the rate of n + 1: a warm-up of w steps reaches the peak at step w.
    scheduler.step(1)
    return optimizer, scheduler


def data_parallel_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
