"""What a rank keeps in memory, sends and computes while code runs, seen at torch's dispatcher.

The same observer looks at a rehearsal (fake tensors, a fake process group) and at a real step (CPU,
gloo): what it counts in one is what it counts in the other.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send", 0),
}
"""c10d's operators: what they are, and the argument that holds the whole of what is exchanged.

What a rank receives point-to-point another has sent: only `send` is counted.
"""

NOT_COUNTED = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}


@dataclass(frozen=True)
class Call:
    """A kind of message."""

    collective: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send."""
    group: str
    """megatron-core's description of its process group."""
    peer: int | None = None
    """Of a `send`: the rank that receives."""


@dataclass
class Work:
    """What was done over some time; the difference of two is what was done between them."""

    messages: Counter[tuple[Call, int]] = field(default_factory=Counter)
    """How often a message of so many bytes was sent. The bytes are those of the whole result
    (all_gather), of the whole input (others), on this rank.
    """
    kernels: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How often an operator of so many (FLOPs, bytes read and written) ran; FLOPs are those of
    matrix products and attention.
    """

    def minus(self, other: Work) -> Work:
        """What is in this and not in the other; counts may be negative."""
        result = Work(Counter(self.messages), Counter(self.kernels))
        result.messages.subtract(other.messages)
        result.kernels.subtract(other.kernels)
        return result

    def plus(self, other: Work, times: float) -> Work:
        """This and `times` the other."""
        result = Work(Counter(self.messages), Counter(self.kernels))
        for mine, theirs in (
            (result.messages, other.messages),
            (result.kernels, other.kernels),
        ):
            for key, count in theirs.items():
                mine[key] += count * times  # type: ignore[index,assignment]
        return result

    @property
    def flops(self) -> float:
        return float(sum(flops * count for (flops, _), count in self.kernels.items()))

    def bytes_by_call(self) -> dict[tuple[str, str], float]:
        """Bytes of each (collective, group)."""
        total: Counter[tuple[str, str]] = Counter()
        for (call, size), count in self.messages.items():
            total[call.collective, call.group] += size * count
        return {key: float(size) for key, size in total.items() if size}


class Observer(TorchDispatchMode):
    """Counts live storages, messages and kernels while it is entered.

    `work` grows; `peak` is the largest sum of live bytes since the last `reset_peak`, and
    `peak_buffers` what of it took part in messages and was not there at that time already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.live = 0
        self.peak = 0
        self.groups: dict[str, list[int]] = {}
        """Ranks of the groups that were used, by description."""
        self.peak_buffers = 0
        self._storages: dict[int, int] = {}
        self._kept: set[int] = set()
        self._buffers: set[int] = set()
        self._buffer_bytes = 0

    def reset_peak(self) -> None:
        self.peak, self.peak_buffers = self.live, 0
        self._kept = set(self._storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs or {})
        if func.namespace == "c10d":
            self._count_message(func.overloadpacket.__name__, args)
        else:
            for tensor in _tensors(result):
                self._note(tensor)
            if not func.is_view:
                self._count_kernel(func, args, kwargs or {}, result)
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; a subclass may know better what it returns."""
        return func(*args, **kwargs)

    # --- memory -----------------------------------------------------------------------------------

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._storages.get(key)
        if known == size:
            return
        if known is None:
            weakref.finalize(storage, self._forget, key).atexit = False
        self._storages[key] = size
        self.live += size - (known or 0)
        if self.live > self.peak:
            self.peak, self.peak_buffers = self.live, self._buffer_bytes

    def _forget(self, key: int) -> None:
        size = self._storages.pop(key, 0)
        self.live -= size
        self._kept.discard(key)
        if key in self._buffers:
            self._buffers.remove(key)
            self._buffer_bytes -= size

    def _note_buffer(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._storages and key not in self._kept and key not in self._buffers:
            self._buffers.add(key)
            self._buffer_bytes += self._storages[key]

    # --- messages ---------------------------------------------------------------------------------

    def _count_message(self, name: str, args: Any) -> None:
        for tensor in _tensors(args):
            self._note_buffer(tensor)
        if name in NOT_COUNTED:
            return
        if name not in COLLECTIVES:
            raise NotImplementedError(f"the planner does not know the collective c10d.{name}")
        collective, whole = COLLECTIVES[name]
        group = next(ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        if group.size() == 1:
            return
        name = group.group_desc
        if name not in self.groups:
            self.groups[name] = torch.distributed.get_process_group_ranks(group)
        peer = self.groups[name][args[2]] if collective == "send" else None
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(args[whole]))
        self.work.messages[Call(collective, name, peer), size] += 1

    # --- kernels ----------------------------------------------------------------------------------

    def _count_kernel(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func.overloadpacket.__name__
        if name.startswith(
            ("empty", "new_empty", "detach", "_local_scalar", "lift_fresh", "alias")
        ):
            return
        flops = FLOPS[name](args, result) if name in FLOPS else 0
        moved = 0
        seen = set()
        for tensor in (*_tensors((args, kwargs)), *_tensors(result)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                moved += tensor.numel() * tensor.element_size()
        self.work.kernels[flops, moved] += 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# --- FLOPs of matrix products and attention -------------------------------------------------------


def _mm(args: Any, result: Any) -> int:
    a, b = args[0], args[1]
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1] * (a.shape[0] if a.dim() == 3 else 1)


def _addmm(args: Any, result: Any) -> int:
    return _mm(args[1:], result)


def _mv(args: Any, result: Any) -> int:
    return int(2 * args[0].numel())


def _causal(args: Any, position: int) -> float:
    return 0.5 if len(args) > position and args[position] is True else 1.0


def _attention(args: Any, result: Any) -> int:
    """QK^T and AV; of a causal mask's products half are not computed."""
    query, key = args[0], args[1]
    b, heads, s, d = query.shape
    return int(4 * b * heads * s * key.shape[2] * d * _causal(args, 4))


def _attention_backward(args: Any, result: Any) -> int:
    """Five products where the forward pass has two: scores are computed again."""
    query, key = args[1], args[2]
    b, heads, s, d = query.shape
    return int(10 * b * heads * s * key.shape[2] * d * _causal(args, 7))


FLOPS = {
    "mm": _mm,
    "bmm": _mm,
    "mv": _mv,
    "addmm": _addmm,
    "addmm_": _addmm,
    "baddbmm": _addmm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
"""FLOPs of an operator, by its name: (arguments, result) -> FLOPs."""
