"""RMSNorm for the local backend."""

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in fp32 inside, as LLaMA.

    megatron-core's own torch norm refuses sequence parallelism, which a MoE with tensor parallelism
    needs; all it takes is the mark on the weight that has its gradient summed over tensor-parallel
    ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
