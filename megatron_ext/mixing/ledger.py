"""Router loads: how many tokens of each data set each expert of each MoE layer was given.

D data sets, L layers, E experts, b sequences of a micro-batch.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor


class LoadLedger:
    """Counts on the router's own device, without a host synchronisation.

    Counts are integers, so their sum does not depend on the order in which ranks are reduced:
        loads, and whatever is computed from them, are bit-identical on every grid. Each token is
        counted once: the pass that recomputes activations is skipped, padding is left out, ranks of
        a tensor-parallel group hold different tokens (sequence parallelism).
    """

    def __init__(
        self, num_domains: int, num_layers: int, num_experts: int, device: torch.device
    ) -> None:
        shape = (num_domains, num_layers, num_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        """Chosen (token, expert) pairs [D, L, E]."""
        self.mass = torch.zeros(shape, dtype=torch.float64, device=device)
        """Summed routing weights [D, L, E]."""
        self.domains: Tensor | None = None
        """Data set of each sequence of the micro-batch that runs now [b]; None: nothing is
        counted.
        """

    def record(
        self,
        layer: int,
        probs: Tensor,
        routing_map: Tensor,
        batch: int,
        padding_mask: Tensor | None = None,
    ) -> None:
        """Count one router call.

        Args:
            layer: index from 0 over the whole model.
            probs: routing weights [s * b, E] (position-major), zero where not chosen.
            routing_map: chosen experts [s * b, E], bool.
            batch: b.
            padding_mask: bool [s, b], True where padding.
        """
        recomputes = is_checkpointing() and torch.is_grad_enabled()
        if self.domains is None or recomputes:
            return
        with torch.no_grad():
            if padding_mask is not None:
                valid = (~padding_mask).reshape(-1, 1)
                routing_map, probs = routing_map & valid, probs * valid
            experts = routing_map.shape[-1]
            chosen = routing_map.view(-1, batch, experts).sum(0)
            self.counts[:, layer].index_add_(0, self.domains, chosen)
            self.mass[:, layer].index_add_(
                0, self.domains, probs.view(-1, batch, experts).sum(0).double()
            )

    def take(self) -> tuple[Tensor, Tensor]:
        """This rank's counts and mass since the last call [D, L, E]; the ledger starts again from
        zero.
        """
        taken = self.counts.clone(), self.mass.clone()
        self.counts.zero_()
        self.mass.zero_()
        return taken
