"""Experts of full width back into one dense FFN (XFT, arXiv 2404.15247): a weighted sum of them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.errors import UserError


def merge_weights(
    num_experts: int, shared: float | None, coefficients: list[float] | None
) -> tuple[float, Tensor]:
    """Weights of the shared and of the routed experts in the merged FFN; their sum is 1.

    Args:
        num_experts: routed experts E.
        shared: lambda, the shared expert's weight; none: there is no shared expert.
        coefficients: E numbers whose softmax shares out the rest (XFT learns them); none: equally.

    Returns:
        lambda and (1 - lambda) softmax(coefficients), [E] in float64.

    Raises:
        UserError: lambda is no share, or there are not E finite coefficients.
    """
    if shared is not None and not 0 <= shared <= 1:
        raise UserError(f"shared_weight={shared} must lie between 0 and 1")
    values = [0.0] * num_experts if coefficients is None else coefficients
    rest = torch.tensor(values, dtype=torch.float64)
    if rest.shape != (num_experts,) or not rest.isfinite().all():
        raise UserError(
            f"coefficients {values} are not {num_experts} finite numbers, one per routed expert"
        )
    first = shared or 0.0
    return first, (1 - first) * rest.softmax(0)


def merge_experts(
    experts: Tensor, weights: Tensor, shared: Tensor | None, shared_weight: float
) -> Tensor:
    """sum_e weights_e experts_e + shared_weight * shared, summed in fp32.

    Args:
        experts: fc1 [E, 2m, h] or fc2 [E, h, m]; the SwiGLU's gate and up rows are merged alike.
        weights: [E]
        shared: the same matrix of the shared expert, or None.
        shared_weight: lambda.

    Returns:
        [2m, h] or [h, m], of the experts' type.
    """
    merged = torch.zeros(experts.shape[1:])
    if shared is not None:
        merged += shared.float() * shared_weight
    for weight, expert in zip(weights.tolist(), experts, strict=True):
        merged.add_(expert.float(), alpha=weight)
    return merged.to(experts.dtype)
