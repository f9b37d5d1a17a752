"""Strategy reference_loss by one command: the uniform run that it needs, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.runs import DOMAINS, make_run, write_data

from megatron_ext.config import MixingConfig, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.training import reference

STEPS, REFERENCE_STEPS = 6, 4


def recipe(root: Path, name: str, **options: Any) -> RunConfig:
    run = make_run(
        root,
        {"expert_model_parallel_size": 2},
        training={"train_iters": STEPS},
        save=str(root / name),
    )
    options = {"eta": 5.0, "reference_iters": REFERENCE_STEPS, **options}
    run.mixing = MixingConfig(strategy="reference_loss", interval=3, options=options)
    return run


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def on_two_ranks(root: Path) -> dict[str, Any]:
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer

    def fit(run: RunConfig) -> None:
        trainer = Trainer(run, grid, open_data(run, grid.data_rank, grid.data_size, True))
        trainer.load()
        trainer.fit()

    first = recipe(root, "run")
    first.training.exit_duration_minutes = 0.0  # over after the first step
    grid = grids.initialize(first)
    found: dict[str, Any] = {"stopped": not reference.add_references(first, grid)}
    found["early"] = (root / "run" / "reference" / "losses.json").exists()
    second = recipe(root, "run")
    second.training.exit_duration_minutes = 60.0
    assert reference.add_references(second, grid)
    found["minutes"] = second.training.exit_duration_minutes
    found["losses"] = second.mixing.options["references"]
    fit(second)
    third = recipe(root, "run")
    assert reference.add_references(third, grid)
    found["again"] = third.mixing.options["references"]
    fit(recipe(root, "given", references=found["losses"]))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("reference")
    write_data(root)
    first, second = run_ranks(2, on_two_ranks, root)
    assert first["losses"] == second["losses"]
    return root, first


def test_the_reference_run_is_finished_before_the_other_begins(made: Any) -> None:
    root, found = made
    assert found["stopped"] and not found["early"] and 0 < found["minutes"] < 60
    steps = [row["step"] for row in rows(root / "run" / "reference", "train")]
    assert steps == list(range(1, REFERENCE_STEPS + 1))
    assert not rows(root / "run" / "reference", "mixing")  # equal weights throughout
    last = rows(root / "run" / "reference", "valid")[-1]
    assert last["step"] == REFERENCE_STEPS
    assert found["losses"] == {name: last[f"loss/{name}"] for name in DOMAINS} == found["again"]


def test_the_run_is_that_with_these_losses_given(made: Any) -> None:
    root, _ = made
    for kind in ("train", "mixing", "valid"):
        ours, given = (
            [
                {key: value for key, value in row.items() if _is_result(key)}
                for row in rows(root / name, kind)
            ]
            for name in ("run", "given")
        )
        assert ours and ours == given
    weights = [[row[f"weight/{name}"] for name in DOMAINS] for row in rows(root / "run", "mixing")]
    assert len(weights) == 2 and max(weights[0]) > 1 / 3 + 1e-6


def _is_result(key: str) -> bool:
    return key.startswith(("loss", "weight/", "excess_loss/", "grad_norm", "step", "perplexity"))


def test_refusals(tmp_path: Path) -> None:
    assert not reference.is_wanted(recipe(tmp_path, "x", references={"a": 1.0}).mixing)
    nowhere = recipe(tmp_path, "x")
    assert reference.is_wanted(nowhere.mixing)
    nowhere.checkpoint.save = None
    with pytest.raises(UserError, match="there is no place"):
        reference.reference_recipe(nowhere)
    with pytest.raises(UserError, match="reference_iters"):
        reference.reference_recipe(recipe(tmp_path, "x", reference_iters=0))
