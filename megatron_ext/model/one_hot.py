"""Routing that is given instead of chosen: each token goes to one expert that is named for it.

With weight 1, a mixture of whole FFNs computes what the dense model of that expert computes. With a
gate made of the expert's routing vector, a loss reaches the vector (UpIT, arXiv 2410.01610, stage
3).

b sequences, s positions of a context rank, T tokens that a router sees, E experts, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.nn.functional import one_hot, softplus

Gate = Literal["sigmoid", "straight_through"]


def tokens_of(router: Any, per_position: Tensor) -> Tensor:
    """What the tokens of a router have of [b, s], in its order: [T]."""
    mine = per_position.t()
    if router.config.sequence_parallel:
        mine = mine.chunk(router.tp_group.size())[router.tp_group.rank()]
    return mine.reshape(-1)


@contextmanager
def one_expert_a_token(routers: Sequence[Any]) -> Iterator[None]:
    """Tell megatron-core's dispatchers, which reckon with k choices, that there is one."""
    topk = [router.config.moe_router_topk for router in routers]
    for router in routers:
        router.config.moe_router_topk = 1
    try:
        yield
    finally:
        for router, k in zip(routers, topk, strict=True):
            router.config.moe_router_topk = k
            router.given = None


@dataclass(frozen=True)
class OneHotRouting:
    """`LlamaMoeRouter.given`: every token to its expert, with weight 1 and no score scale."""

    experts: Tensor
    """[b, s] int64."""

    def __call__(self, router: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> weights [T, E] fp32, chosen [T, E] bool."""
        chosen = one_hot(tokens_of(router, self.experts), router.config.num_moe_experts).bool()
        return chosen.float(), chosen


@dataclass(frozen=True)
class GatedRouting(OneHotRouting):
    """The same with a gate in place of the weight 1, and a binary loss for all experts' vectors.

    The loss of a layer is a weighted sum over tokens t and experts e: -log sigmoid(h_t . r_e) where
    e is t's expert, else -log(1 - sigmoid(h_t . r_e)), with h the hidden state that the router
    sees. It moves the vectors alone; the gates pass the model's loss on to earlier layers too.
    """

    counted: Tensor
    """[b, s] bool: tokens of the binary loss."""
    vectors: Mapping[int, Tensor]
    """[E, h] fp32 by number of the layer."""
    weights: tuple[Tensor, Tensor]
    """Of a token in the loss of its own expert and of any other, [E] each."""
    scale: float
    """Of the binary loss beside the model's."""
    gate: Gate
    """`sigmoid`: sigmoid(h . r) of the token's expert; `straight_through`: 1, with its gradient."""
    losses: Tensor
    """[] fp64: where the binary loss is added up."""

    def __call__(self, router: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        _, chosen = super().__call__(router, hidden)
        vectors = self.vectors[router.layer_number]
        seen = hidden.reshape(-1, hidden.shape[-1]).float()
        own = (seen * vectors[tokens_of(router, self.experts)]).sum(1, keepdim=True).sigmoid()
        if self.gate == "straight_through":
            own = own + (1 - own).detach()
        logits = seen.detach() @ vectors.t()
        positive, negative = self.weights
        weight = torch.where(chosen, positive, negative)
        weight = weight * tokens_of(router, self.counted).unsqueeze(1)
        loss = (weight * softplus(torch.where(chosen, -logits, logits))).sum()
        self.losses.add_(loss.detach())
        return MoEAuxLossAutoScaler.apply(chosen * own, loss * self.scale), chosen
