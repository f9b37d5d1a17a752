"""Layer-wise score scale: how much louder the experts must speak to be heard as the dense FFN was.

LLaMA-MoE multiplies the chosen experts' outputs by one number, E / k. Its code also estimates a
number for each layer, greedily from the first layer up on a given text:

    factor_L = (mean |residual| / mean |ffn output|) of the MoE / the same ratio of the dense model

where the residual is what the FFN's output is added to, the MoE's scale is 1 in layer L and has
been chosen in the layers below. Hidden states of the whole text are carried from layer to layer, so
each model runs once. b sequences of s tokens, h hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import UserError


@dataclass
class Text:
    """Hidden states of a text between two layers."""

    calls: list[dict[str, Any]]
    """Arguments of the next layer for each batch."""
    masks: list[Tensor]
    """Tokens that count [s, b]."""


@dataclass
class FfnTrace:
    """What one batch's FFN adds and what it is added to, each [s, b, h]."""

    residual: Tensor
    output: Tensor
    shared: Tensor | None = None
    """The shared expert's part of the output, which no score scales."""


def estimate(
    dense_model: Any, moe_model: Any, batches: Sequence[Mapping[str, Tensor]]
) -> list[float]:
    """Score scale of every layer (1 in dense ones), for `ModelConfig.moe_score_scale`.

    Args:
        dense_model, moe_model: our models on one process, in evaluation mode.
        batches: tokens, position_ids, loss_mask [b, s].

    Raises:
        UserError: see `scales`.
    """
    return scales(moe_model, batches, loudness(dense_model, batches))


@torch.no_grad()
def loudness(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """mean |ffn output| / mean |residual| of every layer."""
    text, result = _enter(model, batches), []
    for layer in model.decoder.layers:
        traces = _advance(layer, text)
        residual = _size([trace.residual for trace in traces], text.masks)
        result.append(_size([trace.output for trace in traces], text.masks) / residual)
    return result


@torch.no_grad()
def scales(
    model: Any, batches: Sequence[Mapping[str, Tensor]], targets: Sequence[float]
) -> list[float]:
    """Scales with which the MoE has the loudness `targets` in every layer.

    With a shared expert there is no closed form: the scale is where the sum of both parts is as
    loud as the target.

    Raises:
        UserError: the experts of a layer are silent, or the shared expert alone is louder.
    """
    text, result = _enter(model, batches), []
    for number, (layer, target) in enumerate(zip(model.decoder.layers, targets, strict=True)):
        router = getattr(layer.mlp, "router", None)
        if router is None:
            _advance(layer, text)
            result.append(1.0)
            continue
        if getattr(router.config, "moe_xft_routing", False):
            raise UserError("XFT's routing weighs all experts by a softmax: it has no score scale")
        configured, router.config.moe_score_scale = router.config.moe_score_scale, 1.0
        try:
            traces = _advance(layer, text)
        finally:
            router.config.moe_score_scale = configured
        wanted = target * _size([trace.residual for trace in traces], text.masks)
        scale = _solve(traces, text.masks, wanted, number)
        for call, trace in zip(text.calls, traces, strict=True):
            routed = trace.output if trace.shared is None else trace.output - trace.shared
            call["hidden_states"] = call["hidden_states"] + (scale - 1.0) * routed
        result.append(scale)
    return result


def _solve(traces: list[FfnTrace], masks: list[Tensor], wanted: float, number: int) -> float:
    """The scale s at which mean |s * routed + shared| is `wanted`."""

    def size(scale: float) -> float:
        outputs = [
            scale * trace.output
            if trace.shared is None
            else scale * (trace.output - trace.shared) + trace.shared
            for trace in traces
        ]
        return _size(outputs, masks)

    if all(trace.shared is None for trace in traces):
        if not size(1.0) > 0:
            raise UserError(f"the experts of layer {number} put out zeros: no scale helps")
        return wanted / size(1.0)
    # The size is a convex function of the scale: below `wanted` at 0, it passes it once.
    low, high = 0.0, 1.0
    if size(low) >= wanted:
        raise UserError(
            f"the shared expert of layer {number} alone is louder than the dense FFN",
            "give it fewer neurons, or set the score scale by hand",
        )
    while size(high) < wanted:
        low, high = high, 2 * high
        if high > 1e6:
            raise UserError(f"the experts of layer {number} put out zeros: no scale helps")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return (low + high) / 2


def _size(tensors: list[Tensor], masks: list[Tensor]) -> float:
    """Mean absolute value over the tokens that count."""
    pairs = zip(tensors, masks, strict=True)
    total = sum(float((t.abs().sum(-1, dtype=torch.float64) * mask).sum()) for t, mask in pairs)
    return total / (sum(float(mask.sum()) for mask in masks) * tensors[0].shape[-1])


class _Entered(Exception):
    """The first layer has been reached: nothing above it needs to run."""


def _enter(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Text:
    """What megatron-core calls the first layer with, for each batch."""
    calls: list[dict[str, Any]] = []

    def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args, "megatron-core calls layers by keywords"
        calls.append(kwargs)
        raise _Entered

    hook = model.decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(batch["tokens"], batch["position_ids"], None)
            except _Entered:
                continue
    finally:
        hook.remove()
    return Text(calls, [batch["loss_mask"].t() for batch in batches])


def _advance(layer: Any, text: Text) -> list[FfnTrace]:
    """Take the text through one layer."""
    seen: dict[str, Tensor] = {}

    def see_residual(module: Any, args: tuple[Any, ...]) -> None:
        seen["residual"] = args[0]

    def see(name: str) -> Any:
        def see_output(module: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[name] = output.clone()  # without gradients the residual is added in place

        return see_output

    hooks = [
        layer.pre_mlp_layernorm.register_forward_pre_hook(see_residual),
        layer.mlp.register_forward_hook(see("output")),
    ]
    shared = getattr(layer.mlp, "shared_experts", None)
    if shared is not None:
        hooks.append(shared.register_forward_hook(see("shared")))
    traces = []
    try:
        for call in text.calls:
            call["hidden_states"] = layer(**call)[0]
            traces.append(FfnTrace(**seen))
    finally:
        for hook in hooks:
            hook.remove()
    return traces
