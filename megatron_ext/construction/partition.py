"""Partition of a dense SwiGLU FFN into experts, each a set of its intermediate neurons.

A dense FFN is y = W_down (SiLU(W_gate x) * (W_up x)): a sum over d_h neurons. Any disjoint and
complete split of the neurons into E sets of m = d_h / E makes it the sum of E small FFNs, exactly.
A neuron map is a LongTensor [E, m] of neuron numbers, ascending within an expert (the order within
an expert does not matter to the mathematics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_ext.errors import UserError


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


def contiguous(d_ffn: int, num_experts: int, seed: int = 0, layer: int = 0) -> Tensor:
    """Neurons cut in their order (LLaMA-MoE v2, "vanilla"): [E, d_ffn / E]; no seed matters."""
    return torch.arange(d_ffn).view(num_experts, expert_width(d_ffn, num_experts))


NeuronMapper = Callable[[int, int, int, int], Tensor]
METHODS: dict[str, NeuronMapper] = {
    "independent_random": independent_random,
    "contiguous": contiguous,
}
"""(d_ffn, num_experts, seed, layer) -> neuron map: methods that look at no weights and no data."""


def expert_width(d_ffn: int, num_experts: int) -> int:
    """m = d_h / E; a UserError where it is not a whole number."""
    if num_experts < 1 or d_ffn % num_experts:
        divisors = [n for n in range(2, 129) if d_ffn % n == 0]
        raise UserError(
            f"ffn_hidden_size={d_ffn} is not a multiple of num_experts={num_experts}",
            f"choose one of {', '.join(map(str, divisors))}",
        )
    return d_ffn // num_experts


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
    for expert, chosen in enumerate(neurons):
        _take(down, chosen, 1, fc2[expert])
    return fc2


def _take(weight: Tensor, chosen: Tensor, axis: int, out: Tensor) -> None:
    """out = weight[chosen] or weight[:, chosen]; numpy gathers 16-bit values faster than torch."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]  # numpy knows no bf16
    source, target = weight.view(bits).numpy(), out.view(bits).numpy()
    np.take(source, chosen.numpy(), axis=axis, out=target, mode="clip")


def join_experts(fc1: Tensor, fc2: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `slice_experts` for a disjoint, complete map: gate, up [d_h, h], down [h, d_h]."""
    width, hidden = neurons.shape[1], fc1.shape[2]
    gate, up = (half.reshape(-1, hidden) for half in fc1.split(width, dim=1))
    back = neurons.reshape(-1).argsort()
    down = fc2.permute(1, 0, 2).reshape(hidden, -1)
    return gate[back], up[back], down[:, back]


def router_weights(
    num_experts: int,
    hidden: int,
    gate: Literal["linear", "mlp"],
    init: Literal["normal", "zero"],
    std: float,
    seed: int,
    layer: int,
) -> tuple[Tensor, Tensor | None]:
    """Start of a layer's router: normal(0, std) as LLaMA-MoE, or zero.

    Returns:
        `router.weight` [E, h] and, for the mlp gate, `router.gate_out` [E, E] (else None), fp32.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, layer, 1))))

    def draw(*shape: int) -> Tensor:
        if init == "zero":
            return torch.zeros(shape)
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * std

    first = draw(num_experts, hidden)
    return first, draw(num_experts, num_experts) if gate == "mlp" else None
