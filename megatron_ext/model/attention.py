"""Core attention of the local backend: torch's scaled_dot_product_attention."""

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class SdpaAttention(DotProductAttention):
    """Grouped-query causal attention without the [s, s] score matrix of megatron-core's local
    attention.
    """

    def forward(  # type: ignore[override]
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
            query: [s, b, heads, head_dim] key, value: [s, b, groups, head_dim] attention_mask: None
                (causal), or bool [b or 1, 1, s, s], True where a query must not look.

        Returns:
            [s, b, heads * head_dim]
        """
        assert attention_bias is None and packed_seq_params is None
        grouped = query.shape[2] != key.shape[2]
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        s, b = query.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(s, b, -1)
