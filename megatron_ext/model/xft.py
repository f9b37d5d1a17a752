"""XFT's routing (arXiv 2404.15247): a shared expert gets what the best routed expert leaves over.

With s the softmax over all routed experts' logits and s_max its largest value, the shared expert
weighs 1 - s_max, and the k chosen share s_max out by a softmax over their s. All weights sum to 1,
so that experts which are copies of a dense FFN compute what it computed.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor


def xft_weights(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of routed and shared experts.

    Args:
        logits: [T, E]
        chosen: [T, E] bool, at least one for each token.

    Returns:
        routed [T, E], zero where not chosen, and shared [T]; in fp32 or the logits' fp64.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    scores = exact.softmax(-1)
    largest = scores.amax(-1, keepdim=True)
    routed = scores.masked_fill(~chosen, -torch.inf).softmax(-1) * largest
    return routed, 1 - largest.squeeze(-1)


class XftMoELayer(MoELayer):
    """megatron-core's layer with a shared expert that the router weighs, token by token.

    Router and shared expert see the same positions on every grid: with sequence parallelism both
    hold this rank's share of them.
    """

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        router: Any = self.router
        weight, router.shared_weight = router.shared_weight, None
        assert shared_expert_output is not None and weight is not None
        weight = weight.view(*shared_expert_output.shape[:-1], 1).to(shared_expert_output.dtype)
        result: Tensor = super().postprocess(output, shared_expert_output * weight)
        return result
