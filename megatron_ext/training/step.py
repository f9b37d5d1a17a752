"""One micro-batch: what a forward pass is given and how its loss is summed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.mixing.ledger import LoadLedger

MicroBatch = dict[str, Tensor]


class ForwardStep:
    """megatron-core's forward_step_func, with the state that a micro-batch carries into the model.

    Args:
        ledger: counts router loads; None for a dense model.
        num_domains: D.
        device: where the model is.
        seed: of the gate noise.
        routers: of this rank's chunks.
    """

    def __init__(
        self,
        ledger: LoadLedger | None,
        num_domains: int,
        device: torch.device,
        seed: int,
        routers: Sequence[Any] = (),
    ) -> None:
        self.routers = routers
        self.ledger = ledger
        self.num_domains = num_domains
        self.device = device
        self.seed = seed
        self.step = 0
        """Optimizer step, part of the key of the gate noise."""

    def __call__(
        self, data_iterator: Iterator[tuple[int, MicroBatch]], model: Any, *unused: Any
    ) -> tuple[Tensor, Any]:
        """One forward pass.

        Args:
            data_iterator: (number of the micro-batch in the global batch, its tensors).
            model: this rank's chunk.

        Returns:
            The model's output, and the function that sums its loss.
        """
        number, batch = next(data_iterator)
        # Keyed by the micro-batch, not by the rank that has it: noise does not depend on the grid.
        for router in self.routers:
            router.noise_seed = (self.seed * 1_000_003 + self.step * 65_537 + number) % 2**62
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        if self.ledger is not None:
            self.ledger.domains = batch["domain"]
        output = model(
            batch.get("tokens"),
            batch.get("position_ids"),
            None,
            labels=batch.get("labels"),
            loss_mask=batch.get("loss_mask"),
        )
        sum_loss = functools.partial(
            _sum_loss, batch.get("loss_mask"), batch["domain"], self.num_domains
        )
        return output, sum_loss


def _sum_loss(
    loss_mask: Tensor | None, domain: Tensor, num_domains: int, losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the trained tokens' losses, their number, and both per data set.

    Args:
        loss_mask: [b, s], 1 where a token is trained.
        domain: [b].
        losses: [b, s].
    """
    assert loss_mask is not None, "the last stage reads tokens"
    masked = losses.float() * loss_mask
    per_sample = masked.detach().double().sum(1)
    sums = torch.zeros(2, num_domains, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, domain, per_sample)
    sums[1].index_add_(0, domain, loss_mask.double().sum(1))
    return masked.sum(), loss_mask.sum().int(), {"domains": sums}
