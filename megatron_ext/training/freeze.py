"""What a run leaves as it is (MoE-SFT freezes the gates)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Freeze = Literal["none", "router", "reference"]


def freeze_routers(chunk: Any) -> None:
    """No gradient for routers (gate, its second layer, noise) and for nothing else.

    Before the chunk is wrapped: megatron-core makes gradient buffers for what is trained.
    """
    for name, parameter in chunk.named_parameters():
        if ".router." in name:
            parameter.requires_grad_(False)


def zero_gate_projections(model: list[Any]) -> None:
    """Take the gradients of the experts' SwiGLU gate rows away, before the optimizer looks at them.

    For `reference`: MoE-SFT's code freezes every parameter with "gate" in its name, and so the gate
    projection of each expert too. Here it shares a tensor with the up projection, of which the
    first half of the rows are the gate's; without a gradient and without weight decay AdamW leaves
    them as they are.
    """
    for gradient in _expert_fc1_gradients(model):
        rows = gradient.shape[-2] // 2
        gradient[..., :rows, :].zero_()


@torch.no_grad()
def _expert_fc1_gradients(model: list[Any]) -> Iterator[Tensor]:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name and ".shared_experts." not in name and "linear_fc1" in name:
                main_grad = getattr(parameter, "main_grad", None)
                gradient = parameter.grad if main_grad is None else main_grad
                if gradient is not None:
                    yield gradient.view(parameter.shape)
