"""Core attention of the local backend: torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.model.context import context_chunks, gather_context


class SdpaAttention(MegatronModule):
    """Grouped-query causal attention without the [s, s] score matrix of megatron-core's local
    attention, and with context parallelism, which that refuses.

    Under context parallelism every rank gathers the keys and values of the whole sequence, and its
    two chunks of queries look at what lies before them.
    """

    def __init__(
        self,
        config: Any,
        *,
        softmax_scale: float | None = None,
        pg_collection: Any,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, head_dim], this context rank's positions.
            key, value: [s, b, groups, head_dim].
            attention_mask: None (causal), or bool [b or 1, 1, s, s], True where a query must not
                look; without context parallelism only.
            packed_seq_params: `packed.PackedRows`, or None where a row is one sequence.

        Returns:
            [s, b, heads * head_dim]
        """
        assert attention_bias is None
        if self.context_group.size() == 1:
            if packed_seq_params is not None:
                return self._attend_packed(query, key, value, 0, packed_seq_params.rows)
            return self._attend(query, key, value, attention_mask)
        assert attention_mask is None, "context parallelism with an attention mask"
        key, value = gather_context(torch.stack((key, value), 1), self.context_group).unbind(1)
        outputs = []
        for number, chunk in zip(context_chunks(self.context_group), query.chunk(2), strict=True):
            start, end = number * len(chunk), (number + 1) * len(chunk)
            if packed_seq_params is not None:
                rows = packed_seq_params.rows
                outputs.append(self._attend_packed(chunk, key, value, start, rows))
            else:
                outputs.append(self._attend_causally(chunk, key[:end], value[:end]))
        return torch.cat(outputs)

    def _attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: int,
        rows: list[list[tuple[int, int]]],
    ) -> Tensor:
        """Queries from position `start` on, each looking at its own sequence of `rows`."""
        end = start + len(query)
        outputs = []
        for row, borders in enumerate(rows):
            here = [(a, min(b, end)) for a, b in borders if a < end and b > start]
            first, lengths = here[0][0], [b - a for a, b in here]
            parts = zip(
                query[:, row : row + 1].split([b - max(a, start) for a, b in here]),
                key[first:end, row : row + 1].split(lengths),
                value[first:end, row : row + 1].split(lengths),
                strict=True,
            )
            outputs.append(torch.cat([self._attend_causally(*part) for part in parts]))
        return torch.cat(outputs, 1)

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries are at the last of the keys' positions."""
        earlier = len(key) - len(query)
        later = None
        if earlier:
            later = query.new_ones(len(query), len(key), dtype=torch.bool).triu(earlier + 1)
        return self._attend(query, key, value, later)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `forward`, on what one rank has; `mask` broadcasts to [b, heads, queries, keys]."""
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            # A head's positions side by side, as the rotary embedding leaves queries and keys.
            value.permute(1, 2, 0, 3).contiguous(),
            attn_mask=None if mask is None else ~mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        s, b = query.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(s, b, -1)
