"""LoRA experts: expert e is the FFN that all experts of a layer share, plus adapters of its own.

On each target matrix, W_e = W + (alpha / r) B_e A_e (arXiv 2106.09685, section 4.1). W never has a
gradient. It is whole on every expert-parallel rank (cut over expert-tensor ranks, as an expert's
matrices are), so a token's copy meets W where it meets its adapter: W costs one product for all
copies on a rank, k for a token, as much as k full experts without their weight gradients.

Shapes: T tokens sent to this rank (sorted by expert), e local experts, m FFN width per
    expert-tensor rank, h hidden, r rank of the adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import linear

from megatron_ext.model.experts import (
    gradient_buffer,
    mark_expert_parameter,
    sharded_gate_up,
    spans_of,
    weighted_swiglu,
    weighted_swiglu_backward,
)
from megatron_ext.random_keys import mixed_seed

# Which dimension of a factor [e, ., .] is cut over expert-tensor ranks; they copy the others.
_CUT = {("gate", "b"): 1, ("up", "b"): 1, ("down", "a"): 2}


class AddLowRank(torch.autograd.Function):
    """y_t += scale x_t A^T B^T in some columns of y, with the factors of token t's expert."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, first: int, x: Tensor, a: Tensor, b: Tensor, scale: float, counts: Any
    ) -> Tensor:
        """y [T, n], x [T, in], a [e, r, in], b [e, out, r] -> y, changed from column `first` on."""
        columns = slice(first, first + b.shape[1])
        low = x.new_empty(x.shape[0], a.shape[1])
        spans = spans_of(counts)
        for expert, (start, end) in spans:
            torch.mm(x[start:end], a[expert].t(), out=low[start:end])
            y[start:end, columns].addmm_(low[start:end], b[expert].t(), alpha=scale)
        ctx.save_for_backward(x, a, b, low)
        ctx.columns, ctx.scale, ctx.spans = columns, scale, spans
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        grad = grads[0][:, ctx.columns]
        grad_a, fused_a = gradient_buffer(a)
        grad_b, fused_b = gradient_buffer(b)
        grad_x, grad_low = torch.empty_like(x), torch.empty_like(low)
        for expert, (start, end) in ctx.spans:
            torch.mm(grad[start:end], b[expert], out=grad_low[start:end])
            grad_b[expert].addmm_(grad[start:end].t(), low[start:end], alpha=ctx.scale)
        grad_low.mul_(ctx.scale)
        for expert, (start, end) in ctx.spans:
            grad_a[expert].addmm_(grad_low[start:end].t(), x[start:end])
            torch.mm(grad_low[start:end], a[expert], out=grad_x[start:end])
        return (
            grads[0],
            None,
            grad_x,
            None if fused_a else grad_a,
            None if fused_b else grad_b,
            None,
            None,
        )


class WeightedSwiglu(torch.autograd.Function):
    """probs_t * SiLU(gate_t) * up_t; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, probs: Tensor) -> Tensor:
        """both [T, 2m] (gate, then up), probs [T] -> [T, m]."""
        ctx.save_for_backward(both, probs)
        return weighted_swiglu(both, probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        both, probs = ctx.saved_tensors
        return weighted_swiglu_backward(both, probs, grads[0].clone())


class LoraExperts(MegatronModule):
    """SwiGLU experts over one frozen FFN, on any expert-parallel x expert-tensor-parallel grid.

    In a checkpoint the shared FFN has the keys of a dense layer's, `linear_fc1.weight` [2m, h] and
    `linear_fc2.weight` [h, m]; the adapters have `experts.lora_<target>_a` [E, r, in] and
    `experts.lora_<target>_b` [E, out, r]. The same with both backends.
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
        width, hidden = config.moe_ffn_hidden_size // self.tp_group.size(), config.hidden_size
        e, r = num_local_experts, config.lora_rank

        def parameter(*shape: int, trained: bool) -> torch.nn.Parameter:
            data = torch.empty(*shape, dtype=config.params_dtype)
            result = torch.nn.Parameter(data, requires_grad=trained)
            mark_expert_parameter(result)
            return result

        self.base_fc1 = parameter(2 * width, hidden, trained=False)
        self.base_fc2 = parameter(hidden, width, trained=False)
        for target in config.lora_targets:
            into, out = (width, hidden) if target == "down" else (hidden, width)
            for factor, shape in (("a", (e, r, into)), ("b", (e, out, r))):
                weight = parameter(*shape, trained=True)
                # Copies: only the first rank's counts in the norm of all gradients.
                copied = (target, factor) not in _CUT
                weight.shared = copied and self.tp_group.rank() > 0  # type: ignore[attr-defined]
                self.register_parameter(f"lora_{target}_{factor}", weight)
        if config.perform_initialization:
            self._initialise(config)

    @torch.no_grad()
    def _initialise(self, config: Any) -> None:
        """B is 0, so that every expert starts as the shared FFN. A is uniform in +-1/sqrt(in), as
        peft and LoRA's own code have it (the paper says Gaussian, without a deviation).

        Drawn whole and cut, for each expert from a seed of its own: no grid changes the weights.
        """
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        first = self.ep_group.rank() * self.num_local_experts
        base, shared = torch.initial_seed(), config.num_moe_experts  # keys: 0, ..., E - 1 and E
        generator = torch.Generator()
        generator.manual_seed(mixed_seed(base, shared))
        hidden, width = self.base_fc2.shape
        whole = torch.randn(3, width * tp_size, hidden, generator=generator)
        mine = whole.mul_(config.init_method_std).chunk(tp_size, dim=1)[tp_rank]
        self.base_fc1.copy_(mine[:2].reshape(2 * width, hidden))
        self.base_fc2.copy_(mine[2].t())
        for local in range(self.num_local_experts):
            generator.manual_seed(mixed_seed(base, first + local))
            for target in config.lora_targets:
                a, b = self._factors(target)
                pieces = tp_size if (target, "a") in _CUT else 1
                drawn = torch.rand(a.shape[1], a.shape[2] * pieces, generator=generator)
                drawn = drawn.mul_(2).sub_(1).mul_(drawn.shape[1] ** -0.5)
                a[local].copy_(drawn.chunk(pieces, dim=1)[tp_rank % pieces])
                b[local].zero_()

    def _factors(self, target: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"lora_{target}_a"), getattr(self, f"lora_{target}_b")

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """[T, h] tokens sorted by expert, [e] counts, [T] probabilities -> ([T, h], no bias)."""
        x, counts = permuted_local_hidden_states, tokens_per_expert.tolist()
        width = self.base_fc2.shape[1]
        both = linear(x, self.base_fc1)
        both = self._adapt("gate", both, 0, x, counts)
        both = self._adapt("up", both, width, x, counts)
        hidden = WeightedSwiglu.apply(both, permuted_probs)
        return self._adapt("down", linear(hidden, self.base_fc2), 0, hidden, counts), None

    def _adapt(self, target: str, y: Tensor, first: int, x: Tensor, counts: list[int]) -> Tensor:
        """Add what a target's adapters make of x [T, in] to y, from a column on."""
        if target not in self.config.lora_targets:
            return y
        factors = []
        for factor, weight in zip("ab", self._factors(target), strict=True):
            if self.tp_group.size() > 1 and (target, factor) not in _CUT:
                # Each expert-tensor rank has the part of the gradient that comes by its own share.
                weight = copy_to_tensor_model_parallel_region(weight, self.tp_group)
            factors.append(weight)
        return AddLowRank.apply(y, first, x, *factors, self.config.lora_scale, counts)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        ep, ep_rank = self.ep_group.size(), self.ep_group.rank()
        tp, tp_rank = self.tp_group.size(), self.tp_group.rank()
        dp_rank, axis = self.dp_group.rank(), len(sharded_offsets)

        def sharded(key: str, data: Tensor, replica: Any, *cuts: tuple[int, int, int]) -> Any:
            return ShardedTensor.from_rank_offsets(
                key, data, *sharded_offsets, *cuts, replica_id=replica, prepend_axis_num=axis
            )

        def half(key: str, data: Tensor, number: int, replica: Any) -> Any:
            return sharded(key, data, replica, (axis, number * tp + tp_rank, 2 * tp))

        dense = f"{prefix.removesuffix('experts.')}linear"
        fc1, fc2, replica = self.base_fc1, self.base_fc2, (0, ep_rank, dp_rank)
        state = {
            "base_fc1": sharded_gate_up(f"{dense}_fc1.weight", fc1, half, replica),
            "base_fc2": sharded(f"{dense}_fc2.weight", fc2, replica, (axis + 1, tp_rank, tp)),
        }
        for target in self.config.lora_targets:
            for factor, weight in zip("ab", self._factors(target), strict=True):
                name, dimension = f"lora_{target}_{factor}", _CUT.get((target, factor))
                cuts = [(axis, ep_rank, ep)]
                if dimension is not None:
                    cuts.append((axis + dimension, tp_rank, tp))
                copy = (0, 0 if dimension is not None else tp_rank, dp_rank)
                state[name] = sharded(f"{prefix}experts.{name}", weight, copy, *cuts)
        return {f"{prefix}{name}": item for name, item in state.items()}
