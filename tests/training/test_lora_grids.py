"""LoRA experts on grids: one process is the oracle, and the base does not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.runs import losses, make_run, make_trainer, train_and_save, write_data

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.validation import validate

TP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
STEPS = 6
RECOMPUTED = {"recompute_granularity": "full"}
GRIDS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2xEP2": (2, {TP: 2, EP: 2}, {}),
    "DP2 with expert-TP2": (2, {ETP: 2}, {}),
    "EP2xPP2, recomputed": (4, {EP: 2, PP: 2}, RECOMPUTED),
}


def lora_run(
    root: Path,
    parallel: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **checkpoint: Any,
) -> RunConfig:
    model = {"num_experts": 4, "moe_ffn_hidden_size": 128, "moe_score_scale": 1.0, "lora_rank": 4}
    return make_run(
        root,
        parallel,
        {**model, "moe_gate": "mlp", "untie_embeddings_and_output_weights": False},
        training={"freeze": "base", **(training or {})},
        optimizer={"lr": 2e-2},
        **checkpoint,
    )


def losses_and_changes(run: RunConfig, steps: int) -> tuple[list[float], dict[str, bool], int]:
    """Losses, which parameters the steps changed, and numbers in the optimizer's first moments."""
    trainer = make_trainer(run)
    [chunk] = trainer.model
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    found = [trainer.train_step().loss for _ in range(steps)]
    changed = {name: bool((p != before[name]).any()) for name, p in chunk.named_parameters()}
    moments = sum(
        state["exp_avg"].numel()
        for part in trainer.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    )
    return found, changed, moments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def start(root: Path) -> tuple[Path, tuple[list[float], dict[str, bool], int]]:
    """What TP2xEP2 saved after a step, and what one process makes of it."""
    directory = root / "start"
    run_ranks(2, train_and_save, lora_run(root, {TP: 2, EP: 2}, save=str(directory)), 1)
    [alone] = run_ranks(1, losses_and_changes, lora_run(root, load=str(directory)), STEPS)
    return directory, alone


def test_adapters_and_routers_alone_are_trained(start: Any) -> None:
    _, changed, moments = start[1]
    trained = {name for name, moved in changed.items() if moved}
    assert trained == {name for name in changed if ".router." in name or ".lora_" in name}
    assert len(trained) == 4 * (2 + 6)
    router, adapters = 4 * 64 + 4 * 4, 3 * 4 * (64 + 128)
    assert moments == 4 * (router + 4 * adapters)


@pytest.mark.parametrize("grid", GRIDS)
def test_losses_equal_one_process(grid: str, start: Any, root: Path) -> None:
    directory, (expected, _, _) = start
    world_size, parallel, training = GRIDS[grid]
    run = lora_run(root, parallel, training, load=str(directory))
    results = run_ranks(world_size, losses, run, STEPS)
    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_frozen_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="freeze=base leaves LoRA adapters to train"):
        validate(make_run(root, training={"freeze": "base"}), 1)
    run = lora_run(root, training={"freeze": "reference"})
    run.optimizer.weight_decay = 0.0
    with pytest.raises(UserError, match="freeze=reference is of experts with gate projections"):
        validate(run, 1)
