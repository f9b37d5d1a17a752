"""Hooks on the dense FFNs of this rank's layers: sums over tokens of what they see.

T = s * b tokens of a micro-batch (position-major), C groups, d_h FFN width, h hidden size. With
tensor parallelism a rank holds a slice of the d_h neurons and, with sequence parallelism, a slice
of the s positions of an FFN's input. Each rank writes its slice into sums of full size, so that
adding up all ranks of a pipeline stage gives the whole.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.training.unfinished import INPUT_GROUPS, INPUTS

IMPORTANCE, GRADIENT, INPUT_SUM, TOKENS = "importance", "gradient", "input_sum", "tokens"


class Probe:
    """What the FFNs of one model chunk see, per layer.

    Args:
        model: this rank's GPTModel, dense, with frozen weights: activations alone have gradients.
        num_groups: C.
    """

    def __init__(self, model: Any, num_groups: int) -> None:
        config = model.config
        self.num_groups = num_groups
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.splits_sequence = bool(config.sequence_parallel) and self.tensor_size > 1
        self.width, self.hidden = config.ffn_hidden_size, config.hidden_size
        self.device = next(model.parameters()).device
        self.centroids: dict[int, Tensor] | None = None
        """Per layer [C, h]: a token's group is the argmax of input . centroid; None: its sample's
        group.
        """
        self.sums: dict[int, dict[str, Tensor]] = {}
        """Per layer (from 0), since `reset`."""
        self.last_hidden: Tensor | None = None
        """Mean last hidden state of each sample since `reset`, float64 [samples, h]."""
        self._batch: dict[str, Tensor] = {}
        self._members: dict[int, Tensor] = {}
        self.layers = []
        for layer in model.decoder.layers:
            number = layer.layer_number - 1
            self.layers.append(number)
            for part, see in (("linear_fc1", self._see_input), ("linear_fc2", self._see_neurons)):
                module = getattr(layer.mlp, part)
                module.register_forward_pre_hook(functools.partial(see, number))
        self.sees_last = model.decoder.final_layernorm is not None
        if self.sees_last:
            model.decoder.final_layernorm.register_forward_hook(self._see_last)

    def reset(self, rows: int, samples: int, with_gradients: bool) -> None:
        """Start from zero.

        Args:
            rows: picked tokens whose FFN input is kept.
            samples: whose mean last hidden state is kept (on the last pipeline stage).
            with_gradients: whether backward passes follow.
        """

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.last_hidden = zeros(samples, self.hidden) if samples and self.sees_last else None
        for layer in self.layers:
            sums = {TOKENS: zeros(self.num_groups), INPUT_SUM: zeros(self.num_groups, self.hidden)}
            if with_gradients:
                sums[IMPORTANCE] = zeros(self.num_groups, self.width)
                sums[GRADIENT] = zeros(self.num_groups, self.width)
            if rows:
                sums[INPUTS] = zeros(rows, self.hidden, dtype=torch.float32)
                # One more than the group, so that 0 says that the token does not count.
                sums[INPUT_GROUPS] = zeros(rows, dtype=torch.int64)
            self.sums[layer] = sums

    def begin(self, batch: dict[str, Tensor]) -> None:
        """Name the micro-batch whose forward pass comes next.

        Args:
            batch: on the model's device, of `SamplePool.micro_batches`; a position whose loss_mask
                is 0 is in no sum.
        """
        self._batch = batch
        mask = batch["loss_mask"].t()
        groups = batch["group"].unsqueeze(0).expand_as(mask)
        self._members = {}
        self._sample_members = self._one_hot(groups, mask)

    def _one_hot(self, groups: Tensor, mask: Tensor) -> Tensor:
        """groups, mask [s, b] -> [T, C], 1 where a counted token is of a group."""
        one_hot = torch.nn.functional.one_hot(groups.clamp(min=0), self.num_groups)
        return (one_hot * mask.unsqueeze(-1)).flatten(0, 1).double()

    def _slice(self, tensor: Tensor) -> Tensor:
        """This rank's positions of [s, ...]."""
        if not self.splits_sequence:
            return tensor
        return tensor.chunk(self.tensor_size)[self.tensor_rank]

    @torch.no_grad()
    def _see_input(self, layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()  # [s or s / TP, b, h]
        mask = self._batch["loss_mask"].t()
        members = self._sample_members
        if self.centroids is not None:
            groups = self._nearest(x, self.centroids[layer])
            members = self._one_hot(groups, mask)
        self._members[layer] = members
        if self.tensor_rank > 0 and not self.splits_sequence:
            return  # a copy of what rank 0 adds up
        sums, batch = self.sums[layer], x.shape[1]
        mine = self._slice(members.view(-1, batch, self.num_groups)).flatten(0, 1)
        sums[TOKENS] += mine.sum(0)
        sums[INPUT_SUM].addmm_(mine.t(), x.flatten(0, 1).double())
        if INPUTS in sums:
            self._keep(sums, x, members.view(-1, batch, self.num_groups))

    def _keep(self, sums: dict[str, Tensor], x: Tensor, members: Tensor) -> None:
        """Store the sampled tokens that are among this rank's positions."""
        sequence, position, row = self._batch["picked"]
        start = x.shape[0] * self.tensor_rank if self.splits_sequence else 0
        here = (position >= start) & (position < start + x.shape[0])
        sequence, position, row = sequence[here], position[here], row[here]
        member = members[position, sequence]
        sums[INPUTS][row] = x[position - start, sequence].float()
        sums[INPUT_GROUPS][row] = (member.argmax(1) + 1) * member.any(1)

    def _nearest(self, x: Tensor, centroids: Tensor) -> Tensor:
        """Group of every token of the micro-batch [s, b], from this rank's positions of x."""
        groups = (x.float() @ centroids.t()).argmax(-1)
        if not self.splits_sequence:
            return groups
        parts = [torch.empty_like(groups) for _ in range(self.tensor_size)]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(parts, groups, group=group)
        return torch.cat(parts)

    def _see_neurons(self, layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        neurons = args[0]  # [s, b, d_h / TP]
        if not torch.is_grad_enabled() or IMPORTANCE not in self.sums[layer]:
            return
        if not neurons.requires_grad:  # the first layer: nothing below it has a gradient
            neurons.requires_grad_()
        # Bound to this micro-batch: a pipeline runs others before this one's backward pass.
        add = functools.partial(self._add, layer, neurons.detach(), self._members.pop(layer))
        neurons.register_hook(add)

    @torch.no_grad()
    def _add(self, layer: int, neurons: Tensor, members: Tensor, gradient: Tensor) -> None:
        width = neurons.shape[-1]
        mine = slice(self.tensor_rank * width, (self.tensor_rank + 1) * width)
        gradient = gradient.float()
        change = (neurons.float() * gradient).abs_()
        sums = self.sums[layer]
        # A product and not an index_add: on CUDA that adds in no fixed order.
        sums[IMPORTANCE][:, mine] += members.t() @ change.flatten(0, 1).double()
        sums[GRADIENT][:, mine] += members.t() @ gradient.abs().flatten(0, 1).double()

    @torch.no_grad()
    def _see_last(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.last_hidden is None or (self.tensor_rank > 0 and not self.splits_sequence):
            return
        mask, sample = self._batch["loss_mask"].t().double(), self._batch["sample"]
        sums = (output.double() * self._slice(mask).unsqueeze(-1)).sum(0)  # [b, h]
        means = sums / mask.sum(0).clamp(min=1).unsqueeze(1)
        self.last_hidden[sample[sample >= 0]] += means[sample >= 0]
