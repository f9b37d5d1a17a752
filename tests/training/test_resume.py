"""A run that is killed, resumed or moved to another grid goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.runs import fingerprint, losses, make_run, make_trainer, train_and_save, write_data

from megatron_ext.config import RunConfig

GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2xEP2": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_data(path)
    return path


def train_on(run: RunConfig, steps: int, terminate_at: int | None = None) -> tuple[list, str]:
    """Losses and the state after `steps` more steps, through the loop that users run."""
    trainer = make_trainer(run)
    seen: list[float] = []
    step = trainer.train_step

    def train_step() -> Any:
        result = step()
        seen.append(result.loss)
        if trainer.iteration == terminate_at and trainer.grid.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    trainer.train_step = train_step
    trainer.run.training.train_iters = trainer.iteration + steps
    trainer.fit()
    return seen, fingerprint(trainer)


@pytest.mark.parametrize("terminated", [False, True], ids=["saved", "SIGTERM"])
@pytest.mark.parametrize("grid", GRIDS)
def test_resumed_run_is_bit_identical(grid: str, terminated: bool, root: Path) -> None:
    world_size, parallel = GRIDS[grid]
    settings: dict[str, Any] = {
        "router": {"moe_gate_noise": True},
        "optimizer": {"lr_decay_iters": 20},
    }
    whole = run_ranks(world_size, train_on, make_run(root, parallel, **settings), 20)
    directory = root / f"{grid} {terminated}"
    half = make_run(root, parallel, save=str(directory), **settings)
    first = run_ranks(world_size, train_on, half, 20 if terminated else 10, 10)
    second = run_ranks(world_size, train_on, half, 10)
    for rank in range(world_size):
        assert first[rank][0] + second[rank][0] == whole[rank][0]
        assert second[rank][1] == whole[rank][1]


@pytest.fixture(scope="module")
def saved_on_grid(root: Path) -> tuple[Path, list[float]]:
    """Three steps on TP2xEP2, saved; and the loss of the fourth there."""
    directory = root / "reshard"
    world_size, parallel = GRIDS["TP2xEP2"]
    run_ranks(world_size, train_and_save, make_run(root, parallel, save=str(directory)), 3)
    next_losses = run_ranks(world_size, losses, make_run(root, parallel, load=str(directory)), 2)
    return directory, next_losses[0]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (4, {"expert_model_parallel_size": 4}),
        (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    ],
    ids=["one process", "EP4", "PP2xEP2"],
)
def test_reshard(
    world_size: int, parallel: dict[str, int], saved_on_grid: tuple[Path, list[float]], root: Path
) -> None:
    """Weights and optimizer state: the loss after the next update is right too (to fp32
    rounding).
    """
    directory, expected = saved_on_grid
    found = run_ranks(world_size, losses, make_run(root, parallel, load=str(directory)), 2)[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_reshard_where_the_first_stage_has_no_experts(root: Path) -> None:
    """Its ranks, rank 0 among them, have no expert optimizer; the checkpoint is whole."""
    model = {"moe_dense_first_layers": 2}
    stages = {"pipeline_model_parallel_size": 2}
    directory = str(root / "dense first stage")
    run_ranks(2, train_and_save, make_run(root, stages, model, save=directory), 3)
    expected = run_ranks(2, losses, make_run(root, stages, model, load=directory), 2)[0]
    found = run_ranks(1, losses, make_run(root, None, model, load=directory), 2)[0]
    assert found == pytest.approx(expected, rel=1e-5)
