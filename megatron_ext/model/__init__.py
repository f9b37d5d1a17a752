"""LLaMA and LLaMA-MoE as megatron-core modules."""
