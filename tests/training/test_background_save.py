"""Checkpoints written while the training goes on hold what was there when they were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from training.runs import fingerprint, make_run, make_trainer, write_data

from megatron_ext.checkpoint import layout
from megatron_ext.config import RunConfig

GRID = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}


def save_while_training(run: RunConfig) -> tuple[str, list[float], list[int]]:
    """State at step 2, the losses after it, and which checkpoints had their name when the training
    was over.
    """
    trainer = make_trainer(run)
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    state = fingerprint(trainer)
    later = [trainer.train_step().loss for _ in range(3)]
    trainer.save()  # waits for the one before
    kept = layout.kept_iterations(Path(run.checkpoint.save or ""))
    trainer.wait_for_save()
    return state, later, kept


def resume(run: RunConfig) -> tuple[str, list[float]]:
    trainer = make_trainer(run)
    return fingerprint(trainer), [trainer.train_step().loss for _ in range(3)]


def test_a_save_in_the_background_is_of_its_step(tmp_path: Path) -> None:
    write_data(tmp_path)
    directory = tmp_path / "run"
    run = make_run(tmp_path, GRID, save=str(directory), async_save=True)
    first = run_ranks(2, save_while_training, run)
    assert layout.kept_iterations(directory) == [2, 5]
    assert layout.latest_iteration(directory) == 5
    assert list(directory.glob("*.incomplete")) == []
    for _, _, kept in first:
        assert kept[:1] == [2]  # the first was whole before the second began
    state = json.loads((layout.iteration_dir(directory, 2) / "run_state.json").read_text())
    assert state["iteration"] == 2

    layout.write_latest(directory, 2)
    second = run_ranks(2, resume, make_run(tmp_path, GRID, save=str(directory)))
    for (at_save, after, _), (loaded, again) in zip(first, second, strict=True):
        assert loaded == at_save
        assert again == pytest.approx(after, abs=0)
