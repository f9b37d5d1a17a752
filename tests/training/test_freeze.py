"""What is frozen stays bit by bit, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.runs import make_run, make_trainer, write_data

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.training.freeze import count_trained
from megatron_ext.validation import validate


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("freeze")
    write_data(path)
    return path


def moved(run: RunConfig) -> dict[str, Any]:
    """Which parameters three steps changed; of the experts' first matrix, which half."""
    trainer = make_trainer(run)
    [chunk] = trainer.model
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    for _ in range(3):
        trainer.train_step()
    changes: dict[str, Any] = {}
    for name, parameter in chunk.named_parameters():
        change = parameter.detach() != before[name]
        if ".experts." in name and "linear_fc1" in name:
            gate, up = change.chunk(2, dim=-2)
            changes[name] = (bool(gate.any()), bool(up.any()))
        else:
            changes[name] = bool(change.any())
    return changes


def trained(run: RunConfig) -> int:
    [chunk] = make_trainer(run).model
    return sum(p.numel() for p in chunk.parameters() if p.requires_grad)


@pytest.mark.parametrize("freeze, rank", [("none", 0), ("router", 0), ("none", 4), ("base", 4)])
def test_what_is_trained_is_counted_from_the_shapes(freeze: str, rank: int, root: Path) -> None:
    lora = {"lora_rank": rank, "moe_ffn_hidden_size": 128} if rank else {}
    run = make_run(root, model={"moe_gate": "mlp", **lora}, training={"freeze": freeze})
    assert run_ranks(1, trained, run) == [count_trained(run.model, run.training.freeze)]


@pytest.mark.parametrize("freeze", ["none", "router", "reference"])
def test_what_moves(freeze: str, root: Path) -> None:
    run = make_run(
        root,
        {"expert_model_parallel_size": 2},
        {"moe_gate": "mlp", "moe_shared_expert_intermediate_size": 16},
        {"moe_gate_noise": True, "moe_balance_loss": "cv2"},
        {"freeze": freeze},
        {"weight_decay": 0.0},
    )
    for changes in run_ranks(2, moved, run):
        routers = {name: change for name, change in changes.items() if ".router." in name}
        experts = {name: change for name, change in changes.items() if isinstance(change, tuple)}
        others = changes.keys() - routers.keys() - experts.keys()
        assert len(routers) == 3 * 4 and len(experts) == 4
        assert set(routers.values()) == {freeze == "none"}
        assert set(experts.values()) == {(freeze != "reference", True)}
        assert all(changes[name] for name in others)


def test_weight_decay_would_move_what_reference_freezes(root: Path) -> None:
    run = make_run(root, training={"freeze": "reference"}, optimizer={"weight_decay": 0.1})
    with pytest.raises(UserError, match="weight_decay=0.1"):
        validate(run, 1)


def fit(run: RunConfig, losses: list[float]) -> None:
    """The loop, with held-out losses made up."""
    trainer = make_trainer(run)
    script = iter(losses)
    trainer.evaluate = lambda: {"code": next(script)}
    trainer.fit()


def test_the_best_checkpoint_is_kept(root: Path, tmp_path: Path) -> None:
    run = make_run(
        root,
        training={"train_iters": 5, "eval_interval": 1},
        save=str(tmp_path),
        keep_latest=1,
        keep_best=True,
    )
    run_ranks(1, fit, run, [5.0, 3.0, 4.0, 3.5, 6.0])
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000005"]
    from megatron_ext.checkpoint.layout import latest_iteration, read_best

    assert read_best(tmp_path) == (2, 3.0) and latest_iteration(tmp_path) == 5
