"""Sequences cut over the ranks of a context-parallel group, in megatron-core's zigzag order.

A sequence is 2 n chunks over n ranks; rank r holds chunks r and 2 n - 1 - r, one of the cheap and
one of the dear end of a causal mask. megatron-core's rotary embedding and TransformerEngine's
attention expect this order.

S positions of a sequence, s = S / n of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def context_chunks(group: Any) -> tuple[int, int]:
    """The two chunks of this rank, of 2 x group size, in the order it holds them."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


def context_share(whole: Tensor, dim: int, group: Any) -> Tensor:
    """This rank's positions: S -> s in dimension `dim`, S being a multiple of 2 x group size."""
    if group.size() == 1:
        return whole
    chunks = whole.chunk(2 * group.size(), dim)
    return torch.cat([chunks[number] for number in context_chunks(group)], dim)


def gather_context(share: Tensor, group: Any) -> Tensor:
    """All ranks' positions in natural order, [s, ...] -> [S, ...]; gradients are summed over ranks
    and cut again.
    """
    if group.size() == 1:
        return share
    chunks = gather_from_sequence_parallel_region(share, group=group).chunk(2 * group.size())
    # 0, 2n-1, 1, 2n-2, ...: the even places count up, the odd ones down.
    return torch.cat((*chunks[::2], *reversed(chunks[1::2])))
