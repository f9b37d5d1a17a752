"""Dense LLaMA checkpoints become Mixture-of-Experts models, on megatron-core."""

__version__ = "0.1.0"
