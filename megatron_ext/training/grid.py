"""Set-up of a rank: device, process groups, seeds, log."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from megatron_ext import platform as platforms
from megatron_ext.config import RunConfig
from megatron_ext.errors import hide_known_warnings
from megatron_ext.validation import data_parallel_size, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """Where this rank stands."""

    platform: platforms.Platform
    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    data_size: int
    pipeline_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reads_tokens(self) -> bool:
        """First and last stages need tokens or labels; the others only each sample's data set."""
        return self.pipeline_rank == 0 or self.is_last_stage

    @property
    def counts_data(self) -> bool:
        """Whether this rank speaks for its data-parallel replica (one of its tensor x context
        ranks).
        """
        return self.tensor_rank == 0 and self.context_rank == 0


def close() -> None:
    """Leave the job: process groups are destroyed after every rank has come here."""
    from megatron.core import parallel_state

    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def world_size_of_environment() -> int:
    """Ranks that torchrun (or SLURM through it) promises; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def initialize(run: RunConfig) -> Grid:
    """Check the recipe against the world size, then make the process groups.

    Raises:
        UserError: before any process group is made.
    """
    world_size = world_size_of_environment()
    validate(run, world_size)
    threads = run.training.threads
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if threads is None and (local_ranks > 1 or "OMP_NUM_THREADS" not in os.environ):
        threads = max(1, (os.cpu_count() or 1) // local_ranks)
    if threads is not None:
        torch.set_num_threads(threads)
    _log_on_main_rank()
    platform = platforms.setup(run.training.device, run.training.transformer_impl)
    from megatron_ext.model.kernels import check_kernels

    check_kernels(run, platform)
    platforms.init_process_group(platform)
    from megatron.core import parallel_state, tensor_parallel

    parallel = run.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tp,
        create_gloo_process_groups=platform.is_cuda,
    )
    # Weights are drawn whole and then cut (CPU), or per tensor-parallel rank from tracked
    # generators (CUDA).
    torch.manual_seed(run.training.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(run.training.seed)
    torch.manual_seed(run.training.seed)
    grid = Grid(
        platform=platform,
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=data_parallel_size(parallel, world_size),
        pipeline_size=parallel.pipeline_model_parallel_size,
    )
    logger.info("platform: %s", platform.description)
    logger.info(
        "grid: %d ranks = tensor %d x pipeline %d x context %d x data %d; "
        "experts over %d ranks x expert-tensor %d",
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        grid.data_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tp,
    )
    return grid


def _log_on_main_rank() -> None:
    is_main = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("megatron_ext").setLevel(logging.INFO if is_main else logging.ERROR)
    # On missing GPU libraries (the platform's line says it) and on deprecations between the two.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    hide_known_warnings()
