"""One micro-batch: what a forward pass is given and how its loss is summed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.mixing.ledger import LoadLedger
from megatron_ext.model.context import context_share
from megatron_ext.model.packed import PackedRows, packed_rows

MicroBatch = dict[str, Tensor]

_WHOLE = ("domain", "cu_seqlens")
"""Without positions: no context rank has a share of them."""


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
        noise_seed = (self.seed * 1_000_003 + self.step * 65_537 + number) % 2**62
        trained = float(batch["loss_mask"].sum()) if "loss_mask" in batch else None
        for router in self.routers:
            router.noise_seed, router.trained_tokens = noise_seed, trained
        batch, packed = place(batch, self.device)
        if self.ledger is not None:
            self.ledger.domains = batch["domain"]
        output = run_model(model, batch, packed)
        sum_loss = functools.partial(
            _sum_loss, batch.get("loss_mask"), batch["domain"], self.num_domains
        )
        return output, sum_loss


def place(batch: MicroBatch, device: torch.device) -> tuple[MicroBatch, PackedRows | None]:
    """A micro-batch where its model is: this context rank's positions of [b, S], what has no
    positions whole; and the sequences in its rows, where they are packed.
    """
    packed = None
    if "cu_seqlens" in batch:
        packed = packed_rows(batch["cu_seqlens"], batch["tokens"].shape, device)
    group = parallel_state.get_context_parallel_group()
    placed = {
        name: (tensor if name in _WHOLE else context_share(tensor, 1, group)).to(
            device, non_blocking=True
        )
        for name, tensor in batch.items()
    }
    return placed, packed


def run_model(model: Any, batch: MicroBatch, packed: PackedRows | None) -> Tensor:
    """One forward pass of a chunk over what `place` returned; on stages that read no tokens, of
    what the stage before has sent.
    """
    output: Tensor = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        None,
        labels=batch.get("labels"),
        loss_mask=batch.get("loss_mask"),
        padding_mask=batch.get("padding_mask"),
        packed_seq_params=packed,
    )
    return output


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
