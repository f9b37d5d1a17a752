"""Weights that the converter wrote, loaded and saved again by a grid of ranks."""

from pathlib import Path

import torch

from megatron_ext.checkpoint import layout, verify
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import tensor_shapes
from megatron_ext.config import ParallelConfig, RunConfig, TrainingConfig
from tests.checkpoint.tiny import RandomWeights, save_checkpoint, small_model
from tests.ranks import run_ranks

MODEL = small_model(
    vocab_size=102,
    num_layers=4,
    num_experts=4,
    moe_shared_expert_intermediate_size=16,
    moe_dense_first_layers=1,
)


def load_and_save(folder: str, again: str) -> list[tuple[int, ...]]:
    """On each of 8 ranks (TP 2 x EP 2 x PP 2): read the weights, save them; shapes of this rank."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from megatron_ext import platform as platforms
    from megatron_ext.model import builder

    platform = platforms.setup("cpu")
    platforms.init_process_group(platform)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    grid = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
    )
    run = RunConfig(model=MODEL, parallel=grid, training=TrainingConfig(precision="fp32"))
    model = verify.load(builder.build_model(run, platform), Path(folder))
    strategy = platforms.save_strategy()
    dist_checkpointing.save(verify.sharded_weights(model), again, strategy)
    return [tuple(parameter.shape) for parameter in model.parameters()]


def test_a_grid_reads_and_writes_the_same_weights(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "converted", MODEL)
    layout.write_model_config(tmp_path, MODEL)
    again = layout.iteration_dir(tmp_path, 1)
    again.mkdir()
    shapes = run_ranks(8, load_and_save, str(layout.iteration_dir(path, 0)), str(again))
    layout.write_latest(tmp_path, 1)
    assert (51, 48) in shapes[0] and (2, 48, 48) in shapes[0]
    stored, source = CheckpointWeights(tmp_path), RandomWeights(MODEL)
    for key in tensor_shapes(MODEL):
        assert torch.equal(stored.tensor(key), source.tensor(key)), key
