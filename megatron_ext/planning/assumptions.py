"""What fake tensors cannot say, because it depends on data: how many tokens each expert is given.

Loads are taken to be even but for a factor: this rank's experts get `imbalance` times the mean of
every rank's tokens, the others the rest. Nothing of the model is replaced: its dispatchers run, and
only the counts that they would read from the device are put in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork

from megatron_ext.planning.observer import Observer

META = torch.device("meta")


class Routing:
    """Assumed loads of a layer on this rank.

    Args:
        experts: E; topk: k; imbalance: load of this rank's experts over the mean, at least 1.
    """

    def __init__(self, experts: int, topk: int, imbalance: float) -> None:
        self.experts, self.topk, self.imbalance = experts, topk, imbalance

    def rows(self, tokens: int, local: int) -> int:
        """Pairs (token, expert) of `tokens` tokens that go to `local` experts of this rank."""
        even = tokens * self.topk * local / self.experts
        return min(round(even * self.imbalance), tokens * min(self.topk, local))

    def counts(self, tokens: int, first: int, local: int) -> np.ndarray:
        """Tokens of one rank for each expert [E], int64; `first` to `first + local` are ours."""
        ours = self.rows(tokens, local)
        counts = np.zeros(self.experts, np.int64)
        counts[first : first + local] = _share_out(ours, local)
        others = np.ones(self.experts, bool)
        others[first : first + local] = False
        if others.any():
            counts[others] = _share_out(tokens * self.topk - ours, int(others.sum()))
        return counts


def _share_out(total: int, parts: int) -> np.ndarray:
    return np.diff(np.arange(parts + 1) * total // parts)


class Rehearsing(Observer):
    """An observer under which tensors have shapes, but no data, and messages go nowhere.

    Every tensor is made on torch's `meta` device. What depends on values is assumed: masks over
    experts choose as many rows as `routing` says; masks over tokens choose all of them; two tensors
    are equal; a number read from the device is 1, a count or flag 0.
    """

    def __init__(self, routing: Routing | None) -> None:
        super().__init__()
        self.routing = routing
        self._inside = False

    def device_of(self, tensor: Tensor) -> torch.device:
        """What code that runs here shall take for a tensor's device: the CPU; torch's own
        operators, the `meta` device.
        """
        return META if self._inside else torch.device("cpu")

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._inside = True
        try:
            return self._run(func, args, kwargs)
        finally:
            self._inside = False

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            done = FakeWork().boxed()
            return done if len(func._schema.returns) == 1 else (args[0], done)
        if name in _ASSUMED:
            known = _ASSUMED[name](self, *args)
            if known is not NotImplemented:
                return known
        if "device" in kwargs:
            if name == "_to_copy" and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
                return args[0].detach()
            kwargs = {**kwargs, "device": META}
            kwargs.pop("pin_memory", None)
        if "generator" in kwargs:
            kwargs = {**kwargs, "generator": None}
        return func(*args, **kwargs)

    def _select(self, tensor: Tensor, mask: Tensor) -> Tensor:
        assert self.routing is not None
        local, tokens = mask.shape
        return tensor.new_empty(self.routing.rows(tokens, local))

    def _index(self, tensor: Tensor, indices: Any) -> Any:
        if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
            return tensor.new_empty(tensor.numel())
        return NotImplemented

    def _equal(self, *tensors: Tensor) -> bool:
        return True

    def _number(self, tensor: Tensor) -> float | int:
        return 1.0 if tensor.is_floating_point() else 0

    def _lift(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=META)


_ASSUMED: dict[str, Any] = {
    "masked_select": Rehearsing._select,
    "index": Rehearsing._index,
    "equal": Rehearsing._equal,
    "_local_scalar_dense": Rehearsing._number,
    "lift_fresh": Rehearsing._lift,
}


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def assumed_loads(routing: Routing | None, skips_identity: bool) -> Iterator[None]:
    """megatron-core's dispatchers, with the counts of `routing` where they read the device.

    Args:
        routing: None for a dense model.
        skips_identity: whether tokens that are sorted already are left as they are (CPU).
    """
    if routing is None:
        yield
        return
    from megatron.core.transformer.moe import token_dispatcher

    core: Any = token_dispatcher
    to_all, gathering = core.MoEAlltoAllTokenDispatcher, core.MoEAllGatherTokenDispatcher
    preprocess, postprocess = to_all.preprocess, gathering.dispatch_postprocess
    permute = core.permute

    def counted(self: Any, routing_map: Tensor) -> Any:
        preprocess(self, routing_map)  # for what it computes and sends
        first, local = self.local_expert_indices[0], self.num_local_experts
        counts = routing.counts(routing_map.shape[0], first, local)
        ours = np.broadcast_to(counts[first : first + local], (self.tp_size, self.ep_size, local))
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = counts.reshape(self.ep_size, local).sum(1)
            self.output_splits = ours.sum(2)[self.tp_rank]
            self.output_splits_tp = ours.sum((1, 2))
        if local > 1:
            self.num_global_tokens_per_local_expert = ours.reshape(-1, local)
            chunks = np.arange(self.num_experts * self.tp_size)
            self.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
            self.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()
        return ours.sum((0, 1))

    def gathered(self: Any, hidden_states: Tensor, probs: Tensor) -> Any:
        hidden, _, probs = postprocess(self, hidden_states, probs)
        return hidden, _share_out(hidden.shape[0], self.num_local_experts), probs

    def permuted(tokens: Tensor, routing_map: Tensor, **options: Any) -> Any:
        options["num_out_tokens"] = routing.rows(*routing_map.shape)
        return permute(tokens, routing_map, **options)

    def sort(x: Tensor, sizes: Any, order: Any, probs: Any = None, **unused: Any) -> Any:
        if skips_identity and np.array_equal(order, np.arange(len(order))):
            return x, probs
        parts = (None if part is None else part.split(sizes.tolist()) for part in (x, probs))
        return tuple(
            None if part is None else torch.cat([part[chunk] for chunk in order]) for part in parts
        )

    with (
        replaced(to_all, "preprocess", counted),
        replaced(gathering, "dispatch_postprocess", gathered),
        replaced(core, "permute", permuted),
        replaced(core, "sort_chunks_by_idxs", sort),
    ):
        yield
