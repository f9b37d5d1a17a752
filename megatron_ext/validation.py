"""What cannot run is refused before a process group exists, with the sum that does not work out."""

from __future__ import annotations

import importlib.util
import math

from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.errors import UserError


def validate(run: RunConfig, world_size: int) -> None:
    """Check a recipe against the number of ranks.

    Raises:
        UserError: the first thing that cannot work.
    """
    run.model.validate()
    for section, name in (
        (run.training, "train_iters"),
        (run.training, "micro_batch_size"),
        (run.training, "global_batch_size"),
        (run.data, "seq_length"),
    ):
        if getattr(section, name) < 1:
            raise UserError(f"{name}={getattr(section, name)} must be at least 1")
    validate_grid(run, world_size)
    validate_fp8(run)
    if run.parallel.overlap_param_gather and not run.parallel.overlap_grad_reduce:
        raise UserError(
            "overlap_param_gather=true without overlap_grad_reduce: parameters are gathered in the "
            "buckets in which gradients travel",
            "set both",
        )
    if run.training.freeze == "reference" and run.optimizer.weight_decay:
        raise UserError(
            f"training.freeze=reference with weight_decay={run.optimizer.weight_decay}: the decay "
            "would shrink the frozen projections",
            "set weight_decay to 0, as MoE-SFT",
        )
    if run.training.freeze == "reference" and run.model.lora_rank is not None:
        raise UserError(
            "training.freeze=reference is of experts with gate projections of their own",
            "LoRA experts share one that never moves: use router, base or none",
        )
    if run.training.freeze == "base" and run.model.lora_rank is None:
        raise UserError(
            "training.freeze=base leaves LoRA adapters to train, and the model has none",
            "convert with --lora-rank, or freeze router or nothing",
        )
    if run.logging.generate_tokens and (
        run.data.task != "sft" or run.parallel.context_parallel_size > 1
    ):
        raise UserError(
            f"logging.generate_tokens={run.logging.generate_tokens} answers held-out conversations "
            "on whole sequences",
            "set it with data.task: sft and context_parallel_size 1, or leave it at 0",
        )
    if run.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb_project is set, but wandb is not installed", "pip install wandb")
    longest = run.model.max_position_embeddings
    if run.data.seq_length > longest and not run.model.rope_scaling_factor:
        raise UserError(
            f"seq_length={run.data.seq_length} exceeds max_position_embeddings={longest}",
            "shorten seq_length, or raise max_position_embeddings if you mean to extrapolate RoPE",
        )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """World size over TP x PP x CP; a UserError with the sum where it does not divide."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    model = tp * pp * cp
    if world_size % model:
        raise UserError(
            f"world size {world_size} is not a multiple of "
            f"tensor {tp} x pipeline {pp} x context {cp} = {model}",
            f"launch a multiple of {model} ranks, or make the grid smaller",
        )
    return world_size // model


def validate_grid(config: RunConfig, world_size: int) -> None:
    """Every divisibility that megatron-core would assert later, checked before a process group
    exists.
    """
    model, parallel, training, data = config.model, config.parallel, config.training, config.data
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if getattr(parallel, name) < 1:
            raise UserError(f"{name}={getattr(parallel, name)} must be at least 1")

    def divides(part: int, whole: int, part_name: str, whole_name: str) -> None:
        if whole % part:
            raise UserError(
                f"{whole_name}={whole} is not a multiple of {part_name}={part}",
                f"choose a divisor of {whole} for {part_name}",
            )

    dp = data_parallel_size(parallel, world_size)
    divides(tp, model.num_attention_heads, "tensor_model_parallel_size", "num_attention_heads")
    divides(tp, model.kv_heads, "tensor_model_parallel_size", "num_query_groups")
    divides(tp, model.ffn_hidden_size, "tensor_model_parallel_size", "ffn_hidden_size")
    divides(tp, model.vocab_size, "tensor_model_parallel_size", "vocab_size")
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    divides(pp * chunks, model.num_layers, "pipeline stages x virtual stages", "num_layers")
    if chunks > 1 and pp == 1:
        raise UserError(
            f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size > 1"
        )
    if model.is_moe:
        assert model.num_experts is not None
        divides(ep, model.num_experts, "expert_model_parallel_size", "num_experts")
        divides(etp, model.expert_width, "expert_tensor_parallel_size", "moe_ffn_hidden_size")
        divides(ep * etp * pp, world_size, "expert x expert-tensor x pipeline ranks", "world size")
        if tp > 1 and not parallel.uses_sequence_parallel:
            raise UserError(
                "a MoE with tensor_model_parallel_size > 1 needs sequence_parallel",
                "leave it unset",
            )
    elif ep > 1 or etp > 1:
        raise UserError(
            f"expert_model_parallel_size={ep}, expert_tensor_parallel_size={etp} on a dense model",
            "convert the checkpoint to a MoE first (tools/convert_llama.py partition)",
        )
    # Context ranks hold two chunks each; sequence parallelism cuts a context rank's share evenly.
    chunked = 2 * cp if cp > 1 else 1
    cut = tp * cp if parallel.uses_sequence_parallel else 1
    for pieces, sum_ in (
        (chunked, f"2 x context {cp}"),
        (cut, f"tensor {tp} x context {cp} (sequence_parallel)"),
    ):
        if data.seq_length % pieces:
            raise UserError(
                f"seq_length={data.seq_length} is not a multiple of {sum_} = {pieces}",
                f"use a multiple of {math.lcm(chunked, cut)}",
            )
    per_step = training.micro_batch_size * dp
    if training.global_batch_size % per_step:
        raise UserError(
            f"global_batch_size={training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data parallel {dp} (world size {world_size} / "
            f"(tensor {tp} x pipeline {pp} x context {cp})) = {per_step}",
            f"use a multiple of {per_step}",
        )
    if training.rampup_batch_size is not None:
        start, increment, _ = training.rampup_batch_size
        if start < 1 or increment < 1 or start % per_step or increment % per_step:
            raise UserError(
                f"start {start} and increment {increment} of rampup_batch_size must each be a "
                f"multiple of {per_step}, the samples that all ranks take at once"
            )
        if (training.global_batch_size - start) % increment:
            raise UserError(
                f"global_batch_size={training.global_batch_size} is not {start} + n x {increment} "
                "of rampup_batch_size"
            )
    if chunks > 1 and (training.global_batch_size // per_step) % pp:
        raise UserError(
            "the interleaved schedule needs micro-batches per step "
            f"({training.global_batch_size // per_step}) to be a multiple of "
            f"pipeline_model_parallel_size={pp}"
        )


def check_vocabulary(largest_token: int, vocab_size: int) -> None:
    """Raise a UserError where data holds a token that the model has no embedding of."""
    if largest_token >= vocab_size:
        raise UserError(
            f"the data holds token {largest_token}, the model knows {vocab_size}",
            "write the data with this model's tokenizer",
        )


def validate_fp8(run: RunConfig) -> None:
    """What no GPU can do in fp8; TransformerEngine's products want multiples of 16."""
    training, model, parallel = run.training, run.model, run.parallel
    if training.fp8 == "none":
        return
    if training.precision == "fp32":
        raise UserError(f"fp8={training.fp8} with precision=fp32", "use precision=bf16 or auto")
    if training.recompute_granularity == "full":
        raise UserError(
            f"fp8={training.fp8} with recompute_granularity=full: TransformerEngine does not say "
            "that it recomputes, and router loads would be counted twice",
            "use recompute_granularity: selective, or none",
        )
    tp = parallel.tensor_model_parallel_size
    share = tp * parallel.context_parallel_size
    sizes = {
        "hidden_size": model.hidden_size,
        "heads x kv_channels of a rank": model.num_attention_heads * model.head_dim // tp,
        "num_query_groups x kv_channels of a rank": model.kv_heads * model.head_dim // tp,
        "ffn_hidden_size of a rank": model.ffn_hidden_size // tp,
        "tokens of a rank": training.micro_batch_size * run.data.seq_length // share,
    }
    if model.is_moe:
        sizes["expert width of a rank"] = model.expert_width // parallel.expert_tp
    if model.moe_shared_expert_intermediate_size:
        sizes["shared expert of a rank"] = model.moe_shared_expert_intermediate_size // tp
    for name, size in sizes.items():
        if size % 16:
            raise UserError(f"fp8={training.fp8}: {name} {size} is not a multiple of 16")
