"""FLOPs that a step needs, and the peak they are compared with."""

from __future__ import annotations

import time

import torch

from megatron_ext.config import ModelConfig

GPU_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "H800": 989.0, "A800": 312.0}
"""Dense bf16 tensor-core peaks (NVIDIA data sheets, without sparsity)."""


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs of the activated path per token (recomputation is not counted).

    A matrix of n weights costs 2n forward and 4n backward. Causal attention looks at half of the
    sequence on average:
    2 products (QK^T, AV) of 2 * heads * head_dim * seq_length / 2, forward, twice that backward.
    """
    h, head = model.hidden_size, model.head_dim
    attention = 2 * h * model.num_attention_heads * head + 2 * h * model.kv_heads * head
    scores = 2 * model.num_attention_heads * head * seq_length / 2
    dense = 3 * h * model.ffn_hidden_size
    moe_layers = len(model.moe_layers)
    weights = model.num_layers * (attention + scores) + model.vocab_size * h
    weights += (model.num_layers - moe_layers) * dense
    if model.is_moe:
        assert model.num_experts is not None
        gate = model.num_experts * (h + (model.num_experts if model.moe_gate == "mlp" else 0))
        experts = 3.0 * h * model.expert_width * model.moe_router_topk
        if model.lora_rank is not None:
            # The shared FFN is not trained: no 2n for its weights' gradients.
            adapters = len(model.lora_targets) * model.lora_rank * (h + model.expert_width)
            experts = 2 / 3 * experts + adapters * model.moe_router_topk
        residual = 3 * h * (model.moe_shared_expert_intermediate_size or 0)
        weights += moe_layers * (gate + experts + residual)
    return 6.0 * weights


def peak_tflops(device: torch.device) -> tuple[float, str]:
    """(peak of one device in TFLOP/s, what it is): the data sheet's for a GPU, a measured sgemm on
    CPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in GPU_PEAK_TFLOPS.items():
            if key in name:
                return peak, f"{key} bf16 dense peak"
        return GPU_PEAK_TFLOPS["A100"], f"A100 peak; {name} is not known: set peak_tflops"
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12, f"sgemm measured at start, {torch.get_num_threads()} threads"
