"""UpIT's router pre-optimisation (arXiv 2410.01610, stage 3) on one rank of any grid.

Every weight of the mixture stays as it is. Seed samples are scored under every expert and sorted
into buckets; then each expert's routing vectors, one a layer, are trained on all buckets at once:
one forward pass sends each sample to its bucket's expert and shows every layer's vectors the hidden
states that its router sees.

N seed samples, E experts, L MoE layers, h hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint.run_state import unwrap
from megatron_ext.config import RunConfig
from megatron_ext.construction.buckets import Negatives, class_weights
from megatron_ext.model.builder import routers
from megatron_ext.model.one_hot import (
    Gate,
    GatedRouting,
    OneHotRouting,
    one_expert_a_token,
    tokens_of,
)
from megatron_ext.training.grid import Grid
from megatron_ext.training.passes import run_schedule
from megatron_ext.training.router_progress import RouterProgress
from megatron_ext.training.seeds import Ints, MicroBatch, SeedSamples
from megatron_ext.training.step import place, run_model

Route = Callable[[Tensor], OneHotRouting | None]
"""From the samples of positions [b, s] to a micro-batch's routing; none: the routers' own."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From samples [b, s], loss mask [b, s] and losses [b, s] to a sum."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, by torch's names."""


@dataclass(frozen=True)
class Training:
    """How routing vectors are trained."""

    epochs: int
    lr: float
    lm_weight: float
    """a of a LM + (1 - a) binary loss."""
    negatives: Negatives
    gate: Gate
    seed: int
    """Of the order of rows in an epoch."""


class RouterInitialiser:
    """The mixture, its routing vectors, and the passes over seed samples that each step needs.

    Args:
        run: its global_batch_size is of rows.
        model: this rank's stage, frozen (`collect.load_frozen`).
        seeds: the same on every rank.
        progress: what an interrupted call has done already.
    """

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: Any,
        seeds: SeedSamples,
        progress: RouterProgress,
        show_progress: bool = True,
    ) -> None:
        assert run.model.num_experts is not None
        self.run, self.grid, self.model, self.seeds = run, grid, model, seeds
        self.progress = progress
        self.num_experts = run.model.num_experts
        self.routers = routers(unwrap(model))
        self.vectors = {
            router.layer_number: router.weight.detach().float().clone().requires_grad_()
            for router in self.routers
        }
        """[E, h] fp32 of each layer of this stage, numbered from 1."""
        self._device = grid.platform.device
        self._show = show_progress and grid.is_main
        if not self.routers and grid.pipeline_rank == 0:
            # A stage without routers has nothing to train, but schedules run backwards through it.
            embedding = unwrap(model).embedding
            embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())

    # --- scores -----------------------------------------------------------------------------------

    def score(self) -> NDArray[np.float64]:
        """Loss of every seed sample under every expert [N, E], nats per trained token (collective).

        In pass p sample i goes to expert (i + p) mod E: all have work in every pass.
        """
        size, experts = self.seeds.size, self.num_experts
        sums = torch.zeros((size + 1) * experts, dtype=torch.float64)
        sums = self.progress.tensors.get("scores", sums)
        done = min(self.progress.passes, experts)
        rows = self.seeds.rows(np.arange(size))
        with one_expert_a_token(self.routers), self._bar(experts * len(rows), "scoring") as bar:
            bar.update(done * len(rows))
            for turn in range(done, experts):
                table = (torch.arange(size + 1, device=self._device) + turn) % experts
                found = torch.zeros_like(sums, device=self._device)

                def add(
                    sample: Tensor,
                    mask: Tensor,
                    losses: Tensor,
                    table: Tensor = table,
                    found: Tensor = found,
                ) -> Tensor:
                    masked = (losses.float() * mask).double()
                    cells = sample * experts + table[sample]
                    if self.grid.tensor_rank == 0:
                        found.index_add_(0, cells.flatten(), masked.flatten())
                    return masked.sum()

                for chunk in self._chunks(rows):
                    self._pass(chunk, functools.partial(_one_hot, table), add, forward_only=True)
                    bar.update(len(chunk))
                torch.distributed.all_reduce(found)
                sums = sums + found.cpu()
                self.progress.keep({"scores": sums}, self.grid.is_main)
        totals = sums.view(-1, experts)[:size].numpy()
        return totals / np.maximum(self.seeds.trained, 1)[:, None]

    # --- training ---------------------------------------------------------------------------------

    def train(self, buckets: Ints, samples: Ints, how: Training) -> list[dict[str, float]]:
        """Train the vectors with Adam, and give them to the routers (collective).

        Args:
            buckets: expert of each seed sample [N].
            samples: those to train on.

        Returns:
            For each epoch, the mean LM loss under the gates and the mean binary loss.
        """
        rows = self.seeds.rows(samples)
        steps_an_epoch = -(-len(rows) // self.run.training.global_batch_size)
        steps = how.epochs * steps_an_epoch
        tokens = np.bincount(buckets[samples], self.seeds.lengths[samples], self.num_experts)
        own, other = (
            torch.from_numpy(weights).float().to(self._device)
            for weights in class_weights(tokens, how.negatives)
        )
        table = self._table(buckets)
        optimizer = torch.optim.Adam(self.vectors.values(), how.lr) if self.vectors else None
        history = self.progress.history
        step = len(history) * steps_an_epoch
        if optimizer is not None and history:
            self._go_on(optimizer, step)
        with one_expert_a_token(self.routers), self._bar(steps, "training routers") as bar:
            bar.update(step)
            for epoch in range(len(history), how.epochs):
                random = np.random.Generator(np.random.Philox(_seed(how.seed, 3, epoch)))
                order = [rows[number] for number in random.permutation(len(rows))]
                sums = np.zeros(4)
                for chunk in self._chunks(order):
                    sums += self._backward(chunk, table, (own, other), how)
                    if optimizer is not None:
                        cosine = (1 + math.cos(math.pi * step / steps)) / 2
                        optimizer.param_groups[0]["lr"] = how.lr * cosine
                        optimizer.step()
                        optimizer.zero_grad()
                    step += 1
                    bar.update(1)
                history.append({"lm": sums[0] / sums[1], "binary": sums[2] / sums[3]})
                self.progress.keep(self._training_state(optimizer), self.grid.is_main)
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in history[-1].items()})
        with torch.no_grad():
            for router in self.routers:
                router.weight.copy_(self.vectors[router.layer_number])
        return history

    def _backward(
        self, rows: list[Ints], table: Tensor, weights: tuple[Tensor, Tensor], how: Training
    ) -> NDArray[np.float64]:
        """Gradients of one step, the same on all ranks of a stage.

        Returns:
            Sum of LM losses, trained tokens, sum of binary losses, their number.
        """
        members = np.concatenate(rows)
        layers = len(self.run.model.moe_layers)
        trained = max(int(self.seeds.trained[members].sum()), 1)
        pairs = int(self.seeds.lengths[members].sum()) * layers * self.num_experts
        losses = torch.zeros(2, dtype=torch.float64, device=self._device)

        def route(sample: Tensor) -> OneHotRouting:
            return GatedRouting(
                table[sample] % self.num_experts,
                counted=table[sample] < self.num_experts,
                vectors=self.vectors,
                weights=weights,
                scale=(1 - how.lm_weight) / pairs,
                gate=how.gate,
                losses=losses[1],
            )

        def add(sample: Tensor, mask: Tensor, found: Tensor) -> Tensor:
            loss = (found.float() * mask).sum()
            if self.grid.tensor_rank == 0:
                losses[0] += loss.detach()
            return loss * (how.lm_weight / trained)

        self._pass(rows, route, add, forward_only=False)
        self._reduce_gradients()
        torch.distributed.all_reduce(losses)
        lm, binary = losses.tolist()
        return np.array([lm, trained, binary, pairs])

    def _reduce_gradients(self) -> None:
        """Ranks of a stage hold the same vectors and see different tokens."""
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        if group.size() == 1 or not self.vectors:
            return
        gradients = [vector.grad for vector in self.vectors.values()]
        flat = torch.stack(gradients)  # type: ignore[arg-type]
        torch.distributed.all_reduce(flat, group=group)
        for vector, gradient in zip(self.vectors.values(), flat, strict=True):
            vector.grad = gradient

    def _training_state(self, optimizer: torch.optim.Adam | None) -> dict[str, Tensor]:
        """Vectors and Adam's moments of all stages (collective)."""
        state = {"vectors": self._of_all_layers(self.vectors)}
        for moment in MOMENTS:
            mine = {
                number: optimizer.state[vector][moment]
                for number, vector in self.vectors.items()
                if optimizer is not None
            }
            state[moment] = self._of_all_layers(mine)
        return state

    def _go_on(self, optimizer: torch.optim.Adam, step: int) -> None:
        """Put back what `_training_state` kept."""
        for number, vector in self.vectors.items():
            place = self.run.model.moe_layers.index(number - 1)
            kept = {
                name: self.progress.tensors[name][place].to(self._device)
                for name in ("vectors", *MOMENTS)
            }
            with torch.no_grad():
                vector.copy_(kept.pop("vectors"))
            optimizer.state[vector] = {"step": torch.tensor(float(step)), **kept}

    def all_vectors(self) -> dict[int, Tensor]:
        """[E, h] of every MoE layer, numbered from 0, on the CPU of every rank (collective)."""
        found = self._of_all_layers(self.vectors)
        return dict(zip(self.run.model.moe_layers, found, strict=True))

    def _of_all_layers(self, mine: Mapping[int, Tensor]) -> Tensor:
        """[L, E, h] on the CPU of every rank, from what each stage has by layer (collective)."""
        shape = (self.num_experts, self.run.model.hidden_size)
        layers = self.run.model.moe_layers
        found = torch.zeros(len(layers), *shape, device=self._device)
        if self.grid.counts_data and self.grid.data_rank == 0:
            for number, values in mine.items():
                found[layers.index(number - 1)] = values.detach()
        torch.distributed.all_reduce(found)
        return found.cpu()

    # --- what the routers do ----------------------------------------------------------------------

    def agreement(self, buckets: Ints, samples: Ints) -> NDArray[np.float64]:
        """How often the routers themselves send a token to its bucket's expert (collective).

        Args:
            buckets: expert of each seed sample [N].
            samples: those to look at.

        Returns:
            [2, L, E]: shares of each bucket's tokens (padding left out) for which its expert is the
            first choice, and among the k chosen; NaN for an empty bucket.
        """
        layers, experts = self.run.model.moe_layers, self.num_experts
        counts = torch.zeros(len(layers), experts + 1, 3, dtype=torch.int64, device=self._device)
        table = self._table(buckets)
        wanted = table  # of the micro-batch that runs now

        def note(sample: Tensor) -> None:
            nonlocal wanted
            wanted = table[sample]

        def see(router: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
            weights, chosen = output
            expert = tokens_of(router, wanted)  # E: padding
            place = expert.clamp(max=experts - 1).unsqueeze(1)
            hits = (weights.argmax(1, keepdim=True) == place, chosen.gather(1, place))
            row = torch.cat((torch.ones_like(place), *(hit.long() for hit in hits)), 1)
            counts[layers.index(router.layer_number - 1)].index_add_(0, expert, row)

        hooks = [router.register_forward_hook(see) for router in self.routers]
        rows = self.seeds.rows(samples)
        with self._bar(len(rows), "measuring routers") as bar:
            for chunk in self._chunks(rows):
                self._pass(chunk, note, lambda sample, mask, losses: losses.sum(), True)
                bar.update(len(chunk))
        for hook in hooks:
            hook.remove()
        torch.distributed.all_reduce(counts)
        tokens, first, among = counts[:, :experts].cpu().double().unbind(-1)
        return torch.stack((first, among)).div(tokens).numpy()

    # --- one pass ---------------------------------------------------------------------------------

    def _table(self, buckets: Ints) -> Tensor:
        """Bucket of each sample, and E for positions without one: [N + 1]."""
        return torch.from_numpy(np.append(buckets, self.num_experts)).to(self._device)

    def _chunks(self, rows: list[Ints]) -> Iterator[list[Ints]]:
        size = self.run.training.global_batch_size
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _bar(self, total: int, title: str) -> tqdm:
        return tqdm(total=total, desc=title, disable=not self._show)

    def _pass(self, rows: list[Ints], route: Route, loss: Loss, forward_only: bool) -> None:
        grid, size = self.grid, self.run.training.micro_batch_size
        batches = self.seeds.micro_batches(rows, size, grid.data_rank, grid.data_size)
        step = functools.partial(self._forward, route, loss)
        run_schedule(self.run, [self.model], step, batches, forward_only)

    def _forward(
        self, route: Route, loss: Loss, batches: Iterator[MicroBatch], model: Any, *unused: Any
    ) -> tuple[Tensor, Any]:
        """megatron-core's forward_step_func, but for the first two arguments."""
        batch, packed = place(next(batches), self._device)
        given = route(batch["sample"])
        for router in self.routers:
            router.given = given
        mask = batch["loss_mask"]
        output = run_model(model, batch, packed)

        def sum_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return loss(batch["sample"], mask, losses), mask.sum().int(), {}

        return output, sum_loss


def _one_hot(table: Tensor, sample: Tensor) -> OneHotRouting:
    return OneHotRouting(table[sample])


def _seed(*key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(key)
