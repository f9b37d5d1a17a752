"""Conversations packed in the rows of a micro-batch: attention within each, not across.

The model's tensors stay [s, b, ...], so that routers, losses and pipeline messages are those of any
other micro-batch; only core attention looks at the borders. Positions count on through a row:
rotary embedding is relative and attention stays within a conversation, so that where it begins does
not change the mathematics (only rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.errors import UserError


@dataclass
class PackedRows(PackedSeqParams):
    """What megatron-core hands through to core attention."""

    rows: list[list[tuple[int, int]]] = field(default_factory=list)
    """For each row, where its conversations begin and end."""
    laid_end_to_end: PackedSeqParams | None = None
    """For kernels of variable length, over rows laid end to end."""


def packed_rows(cu_seqlens: Tensor, shape: Sequence[int], device: torch.device) -> PackedRows:
    """From a micro-batch's borders.

    Args:
        cu_seqlens: int32 on CPU, 0 to b * S, with a border at each row's end.
        shape: (b, S).
        device: where the model is.
    """
    rows, seq_length = shape
    borders = cu_seqlens.tolist()
    found: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        row, at = divmod(begin, seq_length)
        found[row].append((at, at + end - begin))
    # An upper bound, and for the rotary embedding the length of a row.
    longest = {"max_seqlen_q": seq_length, "max_seqlen_kv": seq_length}
    ends = cu_seqlens.to(device, non_blocking=True)
    flat = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, **longest)
    return PackedRows(qkv_format="sbhd", rows=found, laid_end_to_end=flat, **longest)


def attends_to_packed_rows(attention: type) -> type:
    """TransformerEngine's core attention, which wants packed sequences as [tokens, heads, d]."""

    class PackedAttention(attention):  # type: ignore[misc,valid-type]
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            packed_seq_params: Any = None,
            **kwargs: Any,
        ) -> Tensor:
            """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]."""
            if not isinstance(packed_seq_params, PackedRows):
                return super().forward(  # type: ignore[no-any-return]
                    query,
                    key,
                    value,
                    attention_mask,
                    packed_seq_params=packed_seq_params,
                    **kwargs,
                )
            if self.config.context_parallel_size > 1:
                raise UserError(
                    "TransformerEngine does not split packed rows over context-parallel ranks",
                    "set data.packing: padded, or transformer_impl: local",
                )
            s, b = query.shape[:2]
            context = super().forward(
                *(t.transpose(0, 1).reshape(s * b, *t.shape[2:]) for t in (query, key, value)),
                attention_mask,
                packed_seq_params=packed_seq_params.laid_end_to_end,
                **kwargs,
            )
            return context.reshape(b, s, -1).transpose(0, 1).contiguous()

    return PackedAttention
