"""Partition of a dense SwiGLU FFN into experts, each a set of its intermediate neurons.

A dense FFN is y = W_down (SiLU(W_gate x) * (W_up x)): a sum over d_h neurons. Any disjoint and
complete split of the neurons into E sets of m = d_h / E makes it the sum of E small FFNs, exactly.
Methods that look at nothing are here, the others beside; `methods.py` has them all under one roof.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError

_ROWS = 16


@dataclass(frozen=True)
class NeuronMap:
    """Which neurons of a dense FFN each expert has.

    Ascending within an expert; the order there does not matter to the mathematics.
    """

    experts: Tensor
    """[E, m] int64."""
    residual: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """[R * m] int64: neurons of the residual expert, which is always on; empty: there is none."""

    def is_complete(self, d_ffn: int) -> bool:
        """Whether every neuron is there exactly once."""
        neurons = torch.cat([self.experts.reshape(-1), self.residual])
        return torch.equal(neurons.sort().values, torch.arange(d_ffn))


def independent_random(d_ffn: int, num_experts: int, seed: int, layer: int) -> Tensor:
    """Neurons dealt at random (LLaMA-MoE, "Independent-Random"), anew for every (seed, layer).

    The generator is numpy's Philox keyed by SeedSequence((seed, layer)); the map is recorded with
    the checkpoint, so that nothing depends on the generator later.

    Returns:
        [E, d_ffn / E]

    Raises:
        UserError: E does not divide d_ffn.
    """
    width = expert_width(d_ffn, num_experts)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, layer))))
    neurons = torch.from_numpy(generator.permutation(d_ffn)).view(num_experts, width)
    return neurons.sort(dim=1).values


def contiguous(d_ffn: int, num_experts: int) -> Tensor:
    """Neurons cut in their order (LLaMA-MoE v2, "vanilla"): [E, d_ffn / E]."""
    return torch.arange(d_ffn).view(num_experts, expert_width(d_ffn, num_experts))


def expert_width(d_ffn: int, num_experts: int, num_residual: int = 0) -> int:
    """m = d_h / (E + R); a UserError where it is not a whole number."""
    parts = num_experts + num_residual
    if num_experts < 1 or d_ffn % parts:
        divisors = [n - num_residual for n in range(num_residual + 2, 129) if d_ffn % n == 0]
        beside = f" + num_residual={num_residual}" if num_residual else ""
        raise UserError(
            f"ffn_hidden_size={d_ffn} is not a multiple of num_experts={num_experts}{beside}",
            f"choose num_experts out of {', '.join(map(str, divisors))}",
        )
    return d_ffn // parts


def slice_experts(gate: Tensor, up: Tensor, down: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the experts' matrices out of a dense FFN.

    Args:
        gate, up: [d_h, h]
        down: [h, d_h]
        neurons: [E, m] neuron map.

    Returns:
        fc1 [E, 2m, h] (gate rows, then up rows) and fc2 [E, h, m].
    """
    return slice_fc1(gate, up, neurons), slice_fc2(down, neurons)


def slice_fc1(gate: Tensor, up: Tensor, neurons: Tensor) -> Tensor:
    """First half of `slice_experts`."""
    experts, width = neurons.shape
    fc1 = gate.new_empty(experts, 2 * width, gate.shape[1])
    for expert, chosen in enumerate(neurons):
        _take(gate, chosen, 0, fc1[expert, :width])
        _take(up, chosen, 0, fc1[expert, width:])
    return fc1


def slice_fc2(down: Tensor, neurons: Tensor) -> Tensor:
    """Second half of `slice_experts`."""
    experts, width = neurons.shape
    fc2 = down.new_empty(experts, down.shape[0], width)
    for start in range(0, len(down), _ROWS):  # all experts, while these rows are in the cache
        rows = slice(start, start + _ROWS)
        for expert, chosen in enumerate(neurons):
            _take(down[rows], chosen, 1, fc2[expert, rows])
    return fc2


def _take(weight: Tensor, chosen: Tensor, axis: int, out: Tensor) -> None:
    """out = weight[chosen] or weight[:, chosen]; numpy gathers 16-bit values faster than torch."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]  # numpy knows no bf16
    source, target = weight.view(bits).numpy(), out.view(bits).numpy()
    np.take(source, chosen.numpy(), axis=axis, out=target, mode="clip")
