"""RMSNorm for the local backend."""

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, as LLaMA.

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
        if x.is_cuda:
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return CpuRmsNorm.apply(x, self.weight, self.eps)


class CpuRmsNorm(torch.autograd.Function):
    """torch's CPU rms_norm is a chain of passes, and keeps an activation for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        unit = x * inverse
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0)
        # dx = (g w - unit mean(g w unit)) / rms
        mean = torch.mv(product.flatten(0, -2), weight).div_(x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product)
        grad_x.sub_(unit.mul_(mean.view(inverse.shape))).mul_(inverse)
        return grad_x, grad_weight, None
