"""Experts of the local backend: one weight tensor for all experts of a rank, one autograd node for
a layer.

Shapes: T tokens sent to this rank (sorted by expert), e local experts, m expert width per
    expert-tensor rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.random_keys import mixed_seed


class SwigluExperts(torch.autograd.Function):
    """y_t = probs_t * (SiLU(x_t Wg^T) * (x_t Wu^T)) Wd^T with the weights of token t's expert.

    One node instead of E small graphs: the activations are computed for all tokens at once, only
        the matrix products run per expert, and weight gradients are written in place into one
        tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, probs: Tensor, counts: list[int]
    ) -> Tensor:
        """x [T, h], w1 [e, 2m, h] (gate rows, then up rows), w2 [e, h, m], probs [T] -> [T, h]."""
        both = x.new_empty(x.shape[0], 2 * w2.shape[2])
        out = torch.empty_like(x)
        spans = spans_of(counts)
        for expert, (start, end) in spans:
            torch.mm(x[start:end], w1[expert].t(), out=both[start:end])
        weighted = weighted_swiglu(both, probs)
        for expert, (start, end) in spans:
            torch.mm(weighted[start:end], w2[expert].t(), out=out[start:end])
        ctx.save_for_backward(x, w1, w2, probs, both, weighted)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, w1, w2, probs, both, weighted = ctx.saved_tensors
        grad = grad.contiguous()
        trains = ctx.needs_input_grad[1]  # not where routers alone are trained
        grad_w1, fused_w1 = gradient_buffer(w1) if trains else (None, True)
        grad_w2, fused_w2 = gradient_buffer(w2) if trains else (None, True)
        grad_weighted = torch.empty_like(weighted)
        for expert, (start, end) in ctx.spans:
            if grad_w2 is not None:
                grad_w2[expert].addmm_(grad[start:end].t(), weighted[start:end])
            torch.mm(grad[start:end], w2[expert], out=grad_weighted[start:end])
        grad_both, grad_probs = weighted_swiglu_backward(both, probs, grad_weighted)
        grad_x = torch.empty_like(x)
        for expert, (start, end) in ctx.spans:
            if grad_w1 is not None:
                grad_w1[expert].addmm_(grad_both[start:end].t(), x[start:end])
            torch.mm(grad_both[start:end], w1[expert], out=grad_x[start:end])
        return (
            grad_x,
            None if fused_w1 else grad_w1,
            None if fused_w2 else grad_w2,
            grad_probs,
            None,
        )


def weighted_swiglu(both: Tensor, probs: Tensor) -> Tensor:
    """probs_t * SiLU(gate_t) * up_t.

    Args:
        both: [T, 2m], gate and up.
        probs: [T].
    """
    gate, up = both.chunk(2, dim=1)
    hidden = torch.nn.functional.silu(gate).mul_(up)
    return hidden.mul_(probs.unsqueeze(1).to(hidden.dtype))


def weighted_swiglu_backward(
    both: Tensor, probs: Tensor, grad_weighted: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients [T, 2m] and [T] of `weighted_swiglu`; `grad_weighted` [T, m] is written over."""
    gate, up = both.chunk(2, dim=1)
    silu = torch.nn.functional.silu(gate)
    grad_probs = (silu * up).mul_(grad_weighted).sum(1).to(probs.dtype)
    grad_hidden = grad_weighted.mul_(probs.unsqueeze(1).to(silu.dtype))
    grad_both = torch.empty_like(both)
    grad_gate, grad_up = grad_both.chunk(2, dim=1)
    torch.mul(grad_hidden, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
    return grad_both, grad_probs


def gradient_buffer(weight: Tensor) -> tuple[Tensor, bool]:
    """Where a weight gradient is added up, and whether that is megatron-core's own buffer already.

    Adding the product straight into DDP's `main_grad` saves two passes over the weights.
    """
    main_grad: Any = getattr(weight, "main_grad", None)
    if getattr(weight, "fuses_gradient", False) and main_grad.dtype == weight.dtype:
        return main_grad.view_as(weight), True
    return torch.zeros_like(weight), False


def spans_of(counts: list[int]) -> list[tuple[int, tuple[int, int]]]:
    """(expert, (first token, last token + 1)) of the experts that got tokens."""
    spans, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, (start, start + count)))
        start += count
    return spans


class LocalExperts(MegatronModule):
    """SwiGLU experts in plain torch, on any expert-parallel x expert-tensor-parallel grid.

    Checkpoints hold the same tensors as megatron-core's SequentialMLP and TEGroupedMLP
    (`experts.linear_fc1.weight` [E, 2m, h], `experts.linear_fc2.weight` [E, h, m]), so that a run
    may change its backend.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        hidden = config.hidden_size
        self.linear_fc1 = torch.nn.Parameter(
            torch.empty(num_local_experts, 2 * width, hidden, dtype=config.params_dtype)
        )
        self.linear_fc2 = torch.nn.Parameter(
            torch.empty(num_local_experts, hidden, width, dtype=config.params_dtype)
        )
        for parameter in (self.linear_fc1, self.linear_fc2):
            mark_expert_parameter(parameter)
        if config.perform_initialization:
            self._initialise(config)

    def _initialise(self, config: Any) -> None:
        """Each expert's whole matrix from a seed of its own, so that no grid changes the
        weights.
        """
        ep_rank, tp_rank, tp_size = self.ep_group.rank(), self.tp_group.rank(), self.tp_group.size()
        generator = torch.Generator()
        base = torch.initial_seed()
        for local in range(self.num_local_experts):
            expert = ep_rank * self.num_local_experts + local
            generator.manual_seed(mixed_seed(base, expert))
            hidden, width = self.linear_fc2.shape[1], self.linear_fc2.shape[2]
            whole = (
                torch.randn(3, width * tp_size, hidden, generator=generator)
                * config.init_method_std
            )
            mine = whole[:, tp_rank * width : (tp_rank + 1) * width]
            with torch.no_grad():
                self.linear_fc1[local].copy_(mine[:2].reshape(2 * width, hidden))
                self.linear_fc2[local].copy_(mine[2].t())

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """[T, h] tokens sorted by expert, [e] counts, [T] probabilities -> ([T, h], no bias)."""
        output = SwigluExperts.apply(
            permuted_local_hidden_states,
            self.linear_fc1,
            self.linear_fc2,
            permuted_probs,
            tokens_per_expert.tolist(),
        )
        return output, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        ep, ep_rank = self.ep_group.size(), self.ep_group.rank()
        tp, tp_rank = self.tp_group.size(), self.tp_group.rank()
        axis = len(sharded_offsets)
        replica_id = (0, 0, self.dp_group.rank())

        def sharded(
            key: str, data: Tensor, row: tuple[int, int, int], replica: Any
        ) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                data,
                *sharded_offsets,
                (axis, ep_rank, ep),
                row,
                replica_id=replica,
                prepend_axis_num=axis,
            )

        def half(key: str, data: Tensor, number: int, replica: Any) -> ShardedTensor:
            return sharded(key, data, (axis + 1, number * tp + tp_rank, 2 * tp), replica)

        fc1 = sharded_gate_up(
            f"{prefix}experts.linear_fc1.weight", self.linear_fc1, half, replica_id
        )
        fc2 = sharded(
            f"{prefix}experts.linear_fc2.weight",
            self.linear_fc2,
            (axis + 2, tp_rank, tp),
            replica_id,
        )
        return {f"{prefix}linear_fc1": fc1, f"{prefix}linear_fc2": fc2}


def sharded_gate_up(
    key: str, weight: Tensor, half: Callable[..., ShardedTensor], replica_id: Any
) -> ShardedTensorFactory:
    """How a rank's gate and up rows are stored: two blocks of the global tensor.

    Args:
        key: of that tensor.
        weight: [..., 2m, h].
        half: makes one block, of (key, rows, 0 for gate and 1 for up, replica_id).
        replica_id: megatron-core's.
    """

    def split(key: str, data: Tensor, replica: Any, _: Any) -> list[ShardedTensor]:
        rows = data.chunk(2, dim=-2)
        return [half(key, part.contiguous(), n, replica) for n, part in enumerate(rows)]

    return ShardedTensorFactory(
        key, weight, split, lambda blocks: torch.cat(blocks, dim=-2), replica_id
    )


def mark_expert_parameter(parameter: Any) -> None:
    """Tell megatron-core that an expert's weight has a grid of its own.

    megatron-core looks only at expert parallelism. Where experts are not split as the dense layers
    are (TP 2 with expert-TP 1), the ranks of a tensor-parallel group hold copies of an expert and
    see different tokens, so their gradients must be summed over the expert's data-parallel group
    too. Marked on every grid, so that a checkpoint's optimizer state does not depend on it.
    """
    parameter.allreduce = False
    # Counted on every rank of the group that sums the gradient norm: no two of them hold the same
    # part.
    parameter.tensor_model_parallel = True
    parameter.partition_dim = 1
    parameter.partition_stride = 1
