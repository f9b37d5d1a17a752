"""A grid and a GPU that are not there: what a rank is told so that the code that trains runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.planning.assumptions import replaced
from megatron_ext.platform import Platform, use_fused_adam


@dataclass(frozen=True)
class PlannedGpu(Platform):
    """What `platform.setup` finds on a GPU node, for a process that has none."""

    @property
    def is_cuda(self) -> bool:
        return True


@contextlib.contextmanager
def fake_world(run: RunConfig, world_size: int, rank: int, gpu: bool) -> Iterator[Any]:
    """One rank of a grid that does not exist; yields its `Grid`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ext.training import grid as grids

    here = dataclasses.replace(run.training, device="cpu", transformer_impl="local")
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    outside = {name: os.environ.get(name) for name in environment}
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    os.environ.update(environment)
    logging.disable(logging.WARNING)
    try:
        grid = grids.initialize(dataclasses.replace(run, training=here))
        yield posing_as_gpu(grid) if gpu else grid
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        logging.disable(logging.NOTSET)
        torch.distributed.destroy_process_group()
        for name, value in outside.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def posing_as_gpu(grid: Any) -> Any:
    """A CPU's `Grid` whose platform says that it is a GPU."""
    from megatron.core import parallel_state

    for name in [name for name in vars(parallel_state) if name.endswith("_GLOO")]:
        setattr(parallel_state, name, getattr(parallel_state, name.removesuffix("_GLOO")))
    found = grid.platform
    planned = PlannedGpu(found.device, found.transformer_impl, found.description)
    return dataclasses.replace(grid, platform=planned)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **unused: Any,
) -> Tensor:
    """torch's flash attention; without data it would choose the one that holds all scores."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


def _gather_own(objects: list[Any], own: Any, group: Any = None) -> None:
    """`all_gather_object` where all ranks have the same: kinds of parameter groups."""
    objects[:] = [own] * len(objects)


def _norm(kernel: Any, overflow: Any, tensors: list[list[Tensor]], *options: Any) -> Any:
    """The gradient norm; megatron-core's plain one goes through numbers on the host."""
    return torch.norm(torch.stack([torch.norm(tensor) for tensor in tensors[0]])), None


@contextlib.contextmanager
def without_data(gpu: bool) -> Iterator[None]:
    """Code that looks at data or at the device, as it is for tensors that have none."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    with (
        # Kept in its class from one step to the next, and from a rehearsal to real training.
        replaced(MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
        replaced(torch.nn.functional, "scaled_dot_product_attention", _attention),
        replaced(clip_grads, "multi_tensor_applier", _norm),
        replaced(torch.distributed, "all_gather_object", _gather_own),
    ):
        with paths_of_a_gpu() if gpu else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def paths_of_a_gpu() -> Iterator[None]:
    """What the code does where tensors are on a GPU: logits as a whole, names of CUDA's types."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_ext.model.head import LlamaMoeModel

    with (
        replaced(LlamaMoeModel, "_postprocess", GPTModel._postprocess),
        cuda_type_names(),
    ):
        yield


def fuse_adam(optimizer: Any) -> None:
    """torch's fused Adam, in the place of Apex's and TransformerEngine's: no temporaries either."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        use_fused_adam(part.optimizer)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """megatron-core's 16-bit and sharded optimizers tell dtypes by the names of CUDA's types."""
    type_of = Tensor.type

    def named(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_of(self, *args, **kwargs)
        if args or kwargs or not isinstance(found, str):
            return found
        return f"torch.cuda.{found.rsplit('.', 1)[-1]}"

    with replaced(Tensor, "type", named):
        yield
