"""Rotary position embedding for CPUs: two passes over the tensor instead of megatron-core's six."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of each head (LLaMA's
    layout).
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """t [s, b, heads, d], cos and sin [s, 1, 1, d / 2] -> like t.

        In memory a head's positions lie side by side, [b, heads, s, d]: attention is a tenth
        faster on it, and it costs nothing here.
        """
        ctx.save_for_backward(cos, sin)
        s, b, heads, d = t.shape
        out = torch.empty((b, heads, s, d), dtype=t.dtype).permute(2, 0, 1, 3)
        return _rotate(t, cos, sin, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = torch.empty(grads[0].shape, dtype=grads[0].dtype)
        return _rotate(grads[0], cos, -sin, out), None, None


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    half = t.shape[-1] // 2
    torch.mul(t[..., :half], cos, out=out[..., :half]).addcmul_(t[..., half:], sin, value=-1)
    torch.mul(t[..., half:], cos, out=out[..., half:]).addcmul_(t[..., :half], sin)
    return out


def rotate_on_cpu(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """megatron-core's `_apply_rotary_pos_emb_bshd`, taking the short way where it applies."""

    def apply(t: Tensor, freqs: Tensor, **options: Any) -> Tensor:
        # What else megatron-core passes concerns multi-latent attention.
        special = options.get("rotary_interleaved") or options.get("multi_latent_attention")
        if special or options.get("mscale", 1.0) != 1.0 or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, **options)
        half = freqs[..., : t.shape[-1] // 2]
        rotated: Tensor = Rotate.apply(t, half.cos().to(t.dtype), half.sin().to(t.dtype))
        return rotated

    return apply
