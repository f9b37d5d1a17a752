"""CUDA or CPU, megatron-core 0.16 or 0.19: the only file that adapts megatron-core.

On CUDA nothing of megatron-core is touched. On CPU (gloo, plain torch) its CUDA literals are mapped
to the CPU before the first module is built; each mapping below names what it meets. Call `setup`
once per process, before any other part of `megatron_ext` that imports megatron-core's model or
optimizer code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.errors import UserError
from megatron_ext.versions import installed

logger = logging.getLogger(__name__)

TESTED_MEGATRON_CORE = ("0.16", "0.19")


@dataclass(frozen=True)
class Platform:
    """What this process computes with."""

    device: torch.device
    """`cuda:<local rank>` or `cpu`."""
    transformer_impl: str
    """`transformer_engine` or `local`."""
    description: str
    """One line for the log: what was chosen, what is missing."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability: (8, 0) for A100, (9, 0) for H100."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """The torch.distributed backend; gloo beside NCCL serves CPU tensors of checkpoints."""
        return "cpu:gloo,cuda:nccl" if self.is_cuda else "gloo"


def megatron_core_version() -> str:
    """Version of megatron-core; a UserError where it is missing or was never tested."""
    found = installed("megatron-core")
    if found is None:
        raise UserError("megatron-core is not installed", "pip install megatron-llama-moe")
    if not found.startswith(tuple(f"{minor}." for minor in TESTED_MEGATRON_CORE)):
        raise UserError(
            f"megatron-core {found} was never tested with this project",
            f"install one of {', '.join(minor + '.*' for minor in TESTED_MEGATRON_CORE)}",
        )
    return found


def setup(device: str = "auto", transformer_impl: str = "auto") -> Platform:
    """Choose the device and the layer implementation, and adapt megatron-core to them.

    Args:
        device: `auto` (CUDA where there is one), `cuda` or `cpu`.
        transformer_impl: `auto` (TransformerEngine where it is installed and CUDA is used), `local`
            or `transformer_engine`.

    Raises:
        UserError: what was asked for is not there.
    """
    core = megatron_core_version()
    has_cuda = torch.cuda.is_available() if device != "cpu" else False
    if device == "cuda" and not has_cuda:
        raise UserError("device=cuda, but torch sees no CUDA device", "use device=cpu or auto")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if transformer_impl == "transformer_engine" and not (has_te and has_cuda):
        raise UserError(
            "transformer_impl=transformer_engine needs TransformerEngine and a CUDA device",
            "pip install 'megatron-llama-moe[gpu]', or transformer_impl=local",
        )
    if transformer_impl == "auto":
        transformer_impl = "transformer_engine" if has_te and has_cuda else "local"
    chosen = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if has_cuda
        else torch.device("cpu")
    )
    if has_cuda:
        torch.cuda.set_device(chosen)
    else:
        _map_cuda_to_cpu()
    extras = [
        f"{name} {installed(package) or 'not installed'}"
        for name, package in (("TransformerEngine", "transformer-engine"), ("Apex", "apex"))
    ]
    name = (
        torch.cuda.get_device_name(chosen)
        if has_cuda
        else f"CPU, {torch.get_num_threads()} threads"
    )
    versions = f"torch {torch.__version__}, megatron-core {core}"
    description = f"{name}; {transformer_impl} layers; {versions}; {'; '.join(extras)}"
    capability = torch.cuda.get_device_capability(chosen) if has_cuda else None
    return Platform(chosen, transformer_impl, description, capability)


def init_process_group(platform: Platform, timeout_minutes: float = 30.0) -> None:
    """Join the job that torchrun describes in the environment, or be a job of one process."""
    import datetime

    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        torch.distributed.init_process_group(platform.backend, timeout=timeout)
    else:
        torch.distributed.init_process_group(
            platform.backend,
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )


def save_strategy(staged: bool = False) -> Any:
    """megatron-core's torch_dist format, written by this process.

    megatron-core's own strategy starts helper processes even for a synchronous save: they import
    the main module again (seconds for each rank), hang for ever if psutil is missing, and outlive a
    rank that is killed.

    Args:
        staged: `save` only copies this rank's part to host memory; its method `write` writes
            it, over a process group of the save's own.
    """
    import torch.distributed.checkpoint as dcp
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist

    core: Any = torch_dist

    class Save(core.TorchDistSaveShardedStrategy):  # type: ignore[misc]
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            parts, _, _ = core._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, self.keep_only_main_replica
            )
            if staged:
                for part in (part for same_key in parts.values() for part in same_key):
                    if isinstance(part, core.ShardedTensor):  # objects are pickled below
                        part.data = part.data.detach().to("cpu", copy=True)
            self.write = functools.partial(
                dcp.save,
                core.mcore_to_pyt_state_dict(parts, False),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir),
                planner=core.MCoreSavePlanner(
                    dedup_replicated_tensors=not self.keep_only_main_replica,
                    flatten_state_dict=False,
                ),
            )
            if not staged:
                self.write()

    return Save("torch_dist", 1)


# --- CPU
# ------------------------------------------------------------------------------------------------


class _NullStream:
    """Stands for a CUDA stream or event: CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _NullStream:
        return self

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *args: Any) -> None: ...


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _returning(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _on_cpu(factory: Any) -> Any:
    """`factory`, with a CUDA `device=` read as CPU; pinned memory is for copies to a GPU."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


_mapped = False


def _map_cuda_to_cpu() -> None:
    """Let megatron-core's CUDA literals mean the CPU in this process. Idempotent."""
    global _mapped
    if _mapped:
        return
    _mapped = True
    cpu = torch.device("cpu")
    # torch lists its factories when the first is called in `with torch.device(...)`. A list made
    # after they are wrapped here would not hold them: transformers' models, which are built like
    # that, would have uninitialised buffers.
    with cpu:
        torch.empty(0)
    # megatron-core compiles its element-wise fusions when it is imported: on CPU that costs a C++
    # compiler and minutes, for functions that are not on our path.
    torch.compile = _no_compile  # type: ignore[assignment]
    # Streams and events order asynchronous work; here there is none. (Each name gets a function of
    # its own: torch._dynamo, which torch's optimizers import, keeps them in one table.)
    cuda: Any = torch.cuda
    stream = _NullStream()
    cuda.current_device = _returning(cpu)
    cuda.current_stream, cuda.default_stream = _returning(stream), _returning(stream)
    cuda.Stream = cuda.Event = _NullStream
    cuda.stream = lambda *a, **k: contextlib.nullcontext()
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, _returning(None))
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _returning(0), _returning(0)
    tensor: Any = torch.Tensor
    tensor.record_stream = _returning(None)
    # One generator serves both "devices", so that the tracked states of megatron-core are real
    # states.
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.random.default_generator.manual_seed(seed)
    # device="cuda" in optimizer, gradient clipping, gradient buffers, loss trackers, schedules.
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "eye"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_to = torch.Tensor.to
    tensor.cuda = lambda self, *a, **k: self

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (cpu, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = cpu
        return tensor_to(self, *args, **kwargs)

    tensor.to = to_cpu

    import megatron.core.tensor_parallel.random as random
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as optimizer_classes
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_ext.model.rotary import rotate_on_cpu

    # Experts split over expert-tensor ranks gather different numbers of tokens; gloo wants equal
    # shares.
    torch.distributed.all_gather = _gather_unequal(torch.distributed.all_gather)
    torch.distributed.reduce_scatter = _reduce_scatter_unequal(torch.distributed.reduce_scatter)
    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    # gloo's all_to_all_single wants lists or arrays; megatron-core converts the split sizes only
    # when they come from CUDA.
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes_to_host
    rope_utils._apply_rotary_pos_emb_bshd = rotate_on_cpu(rope_utils._apply_rotary_pos_emb_bshd)
    # Without expert parallelism tokens are sorted by expert already.
    token_dispatcher.sort_chunks_by_idxs = _skip_identity(token_dispatcher.sort_chunks_by_idxs)
    clip_grads.clip_grad_by_total_norm_fp32 = _clip_by_total_norm
    optimizer_classes.clip_grad_by_total_norm_fp32 = _clip_by_total_norm


def _gather_unequal(all_gather: Any) -> Any:
    """all_gather that pads the ranks' shares to the largest where they differ in their first
    dimension.
    """

    @functools.wraps(all_gather)
    def gather(outputs: list[torch.Tensor], share: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = [output.shape[0] if output.dim() else 0 for output in outputs]
        if min(rows) == max(rows):
            return all_gather(outputs, share, *args, **kwargs)
        padded = share.new_zeros(max(rows), *share.shape[1:])
        padded[: share.shape[0]] = share
        whole = [torch.empty_like(padded) for _ in outputs]
        all_gather(whole, padded, *args, **kwargs)
        for output, filled in zip(outputs, whole, strict=True):
            output.copy_(filled[: output.shape[0]])

    return gather


def _reduce_scatter_unequal(reduce_scatter: Any) -> Any:
    """reduce_scatter as a sum over the group of which each rank keeps its share, where the shares
    differ.
    """

    @functools.wraps(reduce_scatter)
    def scatter(output: torch.Tensor, shares: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        rows = [share.shape[0] for share in shares]
        if min(rows) == max(rows):
            return reduce_scatter(output, shares, *args, **kwargs)
        group = kwargs.get("group")
        whole = torch.cat(shares)
        torch.distributed.all_reduce(whole, group=group)
        start = sum(rows[: torch.distributed.get_rank(group)])
        output.copy_(whole[start : start + output.shape[0]])

    return scatter


def _no_compile(function: Any = None, **kwargs: Any) -> Any:
    return (lambda f: f) if function is None else function


def _skip_identity(sort_chunks: Any) -> Any:
    @functools.wraps(sort_chunks)
    def sort(
        x: torch.Tensor, sizes: Any, order: torch.Tensor, probs: Any = None, **kwargs: Any
    ) -> Any:
        if torch.equal(order, torch.arange(len(order))):
            return x, probs
        return sort_chunks(x, sizes, order, probs=probs, **kwargs)

    return sort


def use_fused_adam(optimizer: Any) -> None:
    """Let torch's AdamW take its fused CPU kernel; megatron-core builds it as a loop over
    parameters.
    """
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = True, False


def _split_sizes_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's `maybe_move_tensor_to_cpu` for a tensor that is on the CPU already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _clip_by_total_norm(
    parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scale gradients to `max_norm` (megatron-core's own asserts that gradients are CUDA
    tensors).
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    scale = max_norm / (total_norm + 1.0e-6)
    if scale < 1.0 and grads:
        torch._foreach_mul_(grads, scale)
