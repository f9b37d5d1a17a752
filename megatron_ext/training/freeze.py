"""What a run leaves as it is (MoE-SFT freezes the gates, LoRA all but its adapters)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.checkpoint.tensors import FC1, FC2, layer_key, tensor_shapes
from megatron_ext.config import ModelConfig

Freeze = Literal["none", "router", "reference", "base"]


def freeze(chunk: Any, what: Freeze) -> None:
    """Take the gradient from what a run leaves as it is.

    Before the chunk is wrapped: megatron-core makes gradient buffers for what is trained.

    Args:
        chunk: a model chunk.
        what: router, reference: routers (gate, its second layer, noise) and nothing else. base: all
            but them and LoRA adapters.
    """
    if what == "none":
        return
    for name, parameter in chunk.named_parameters():
        if is_frozen(name, what):
            parameter.requires_grad_(False)
    if what == "base" and chunk.pre_process:
        # Without it nothing before the first adapter would be in the graph: recomputation would not
        # reach that adapter, and a pipeline stage of dense layers would have no backward pass.
        chunk.embedding.register_forward_hook(lambda _, __, hidden: hidden.requires_grad_())


def is_frozen(name: str, what: Freeze) -> bool:
    """Whether `freeze` takes the gradient from a weight of this name in modules or checkpoints."""
    if what == "base":
        return ".router." not in name and ".lora_" not in name
    return what != "none" and ".router." in name


def count_trained(model: ModelConfig, what: Freeze) -> int:
    """Parameters of a model that get a gradient: LoRA experts never train the FFN they share."""
    shared = set()
    if model.lora_rank is not None:
        shared = {layer_key(layer, name) for layer in model.moe_layers for name in (FC1, FC2)}
    return sum(
        math.prod(shape)
        for key, shape in tensor_shapes(model).items()
        if key not in shared and not is_frozen(key, what)
    )


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
