"""Blend weights from real routers: the same bits on every rank and grid, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from training.runs import DOMAINS, make_run, make_trainer, write_data

from megatron_ext.config import MixingConfig, RunConfig
from megatron_ext.data.blend import BlendPlan
from megatron_ext.errors import UserError
from megatron_ext.mixing.controller import FOLDS, choose_layers
from megatron_ext.mixing.strategies import Signals, Strategy
from megatron_ext.training.data import open_data

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "EP2": (2, EP2),
    "PP2": (2, PP2),
    "DP4": (4, {}),
    "CP2": (2, {"context_parallel_size": 2}),
    "TP2xEP2": (2, TP2 | EP2),
    "TP2xEP2xPP2": (8, TP2 | EP2 | PP2),
    "interleaved": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
}
RECOMPUTED = ("EP2", "TP2xEP2xPP2", "interleaved")
CASES = [
    *((grid, None) for grid in GRIDS),
    *((grid, granularity) for grid in RECOMPUTED for granularity in ("full", "selective")),
]


class Seen(Strategy):
    """A user's own strategy: leaves the weights alone and shows what it was given."""

    needs = frozenset({"loads", "train_loss", "valid_loss"})
    layers = "all"

    def update(self, signals: Signals) -> Any:
        self.signals = signals
        return signals.weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixing")
    write_data(path)
    return path


def mixed(root: Path, strategy: str, *settings: Any, **mixing: Any) -> RunConfig:
    run = make_run(root, *settings)
    run.mixing = MixingConfig(strategy=strategy, **mixing)
    return run


def first_loads(run: RunConfig) -> tuple[Any, Any, Any]:
    """Loads of a probe [F, D, L, E], then online loads [D, L, E] and losses of the first step.

    Later steps would compare rounding: weights that were updated on different grids differ in
    their last bits, and now and then a token that is torn between two experts falls the other way.
    """
    from megatron_ext.training import held_out

    trainer = make_trainer(run)
    run.mixing.probe_samples = 10
    probed = held_out.probe(trainer.passes, trainer.data)
    online: list[Any] = []
    trainer.data.mixing.observe = lambda step, losses, counts, mass: online.append(
        (counts.copy(), losses.copy())
    )
    trainer.train_step()
    return online[0][0], probed.counts, online[0][1]


@pytest.fixture(scope="module")
def on_one_process(root: Path) -> tuple[Any, Any, Any]:
    return run_ranks(1, first_loads, mixed(root, "static"))[0]


@pytest.mark.parametrize(("grid", "recomputed"), CASES)
def test_loads_are_bit_identical_on_every_grid(
    grid: str, recomputed: str | None, root: Path, on_one_process: tuple[Any, Any, Any]
) -> None:
    world_size, parallel = GRIDS[grid]
    training = {"recompute_granularity": recomputed}
    run = mixed(root, "static", parallel, None, None, training)
    online, probed, losses = on_one_process
    samples, length, topk, layers = 4, 32, run.model.moe_router_topk, run.model.num_layers
    assert online.sum() == samples * length * topk * layers
    assert probed.sum() == len(DOMAINS) * 10 * length * topk * layers
    for rank_online, rank_probed, rank_losses in run_ranks(world_size, first_loads, run):
        assert np.array_equal(rank_online, online)
        assert np.array_equal(rank_probed, probed)
        np.testing.assert_allclose(rank_losses, losses, rtol=1e-6)


def train(run: RunConfig, steps: int, save_at: int | None = None) -> tuple[list[Any], dict]:
    """Updates of a run, and where its blend stands."""
    trainer = make_trainer(run)
    updates = []
    for _ in range(steps):
        result = trainer.train_step()
        if result.update is not None:
            updates.append(result.update)
        if trainer.iteration == save_at:
            trainer.save()
    return updates, trainer.data.plan.state_dict()


@pytest.mark.parametrize("signal", ["online", "probe"])
@pytest.mark.parametrize("strategy", ["router_load", "load_progress"])
def test_all_ranks_decide_the_same_and_a_resumed_run_too(
    strategy: str, signal: str, root: Path
) -> None:
    directory = root / f"{strategy} {signal}"
    options: dict[str, Any] = {"interval": 4, "signal": signal, "probe_samples": 12}
    if strategy == "router_load":
        options["options"] = {"eta": 10.0, "c": 0.05}
    run = mixed(root, strategy, TP2 | EP2, **options)
    ranks = run_ranks(2, train, run, 16)
    updates, state = ranks[0]
    assert ranks[1] == ranks[0]
    assert [update.step for update in updates] == [4, 8, 12, 16]
    assert [update.effective for update in updates] == [6, 10, 14, 18]
    if strategy == "router_load":  # always moves; the other only where the loads bear it
        assert all(update.after != update.before for update in updates)
    run.checkpoint.save = str(directory)
    run_ranks(2, train, run, 10, 10)  # between two updates: a third of the loads is in
    resumed = run_ranks(2, train, run, 6)
    assert resumed[0] == (updates[2:], state)


def test_a_run_is_shown_and_replayed_from_its_log(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples, with no router looked at."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = mixed(root, "router_load", interval=4)
    run.checkpoint.save, run.logging.wandb_project = str(tmp_path), "x"
    run.training.train_iters = 20
    state = run_ranks(1, fit, run)[0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if row["kind"] == "mixing"]
    assert [row["step"] for row in updates] == [4, 8, 12, 16, 20]
    assert {f"weight/{name}" for name in DOMAINS} <= updates[0].keys()
    assert np.shape(updates[0]["load"]) == (len(DOMAINS), run.model.num_experts)
    pictures = {path.name.split("_")[0] for path in tmp_path.glob("wandb/*/files/media/**/*.png")}
    assert pictures == {"load", "distances"}
    log = tmp_path / "blend_weights.jsonl"
    again = mixed(root, "schedule", options={"log": str(log)})
    plan = open_data(again, 0, 1, True).plan
    for _ in range(20):
        plan.next_batch(run.training.global_batch_size)
    assert plan.drawn.tolist() == state["drawn"] and plan.credit.tolist() == state["credit"]
    static = BlendPlan(DOMAINS, plan.num_samples.tolist(), [1, 1, 1], plan.seed)
    for _ in range(20):
        static.next_batch(run.training.global_batch_size)
    assert static.drawn.tolist() != state["drawn"], "the weights did not matter"


def fit(run: RunConfig) -> dict[str, Any]:
    trainer = make_trainer(run)
    trainer.fit()
    return trainer.data.plan.state_dict()


def signals_seen(run: RunConfig) -> Any:
    trainer = make_trainer(run)
    counts = np.zeros((FOLDS, len(DOMAINS), run.model.num_layers, 8), np.int64)
    observe = trainer.data.mixing.observe

    def observed(step: int, losses: Any, of_step: Any, mass: Any) -> None:
        counts[step % FOLDS] += of_step
        observe(step, losses, of_step, mass)

    trainer.data.mixing.observe = observed
    for _ in range(10):
        result = trainer.train_step()
    return trainer.data.mixing.strategy.signals, counts, trainer.evaluate(), result


def test_what_a_users_own_strategy_is_shown(root: Path) -> None:
    run = mixed(root, "mixing.test_controller:Seen", interval=10, layers="1,3")
    [(signals, counts, losses, result)] = run_ranks(1, signals_seen, run)
    assert signals.step == 10 and signals.round == 0 and signals.layers == (1, 3)
    assert np.array_equal(signals.counts, counts) and signals.counts.sum() > 0
    assert signals.train_loss[..., 1].sum() == 10 * 4 * 32
    assert signals.valid_loss.tolist() == [losses[name] for name in DOMAINS]
    assert signals.sizes.tolist() == [149 * 32] * 3
    assert result.update.after == result.update.before


@pytest.mark.parametrize(
    ("mixing", "model", "problem"),
    [
        ({"strategy": "router_lode"}, {}, "unknown mixing strategy"),
        ({"strategy": "router_load", "interval": 2}, {}, "interval=2 is not above 2"),
        ({"strategy": "router_load", "layers": "7"}, {}, "MoE layers are 0 to 3"),
        ({"strategy": "router_load"}, {"num_experts": None}, "the model is dense"),
        ({"strategy": "router_load", "options": {"etta": 1}}, {}, "no option 'etta'"),
    ],
)
def test_nonsense_is_refused(
    mixing: dict[str, Any], model: dict[str, Any], problem: str, root: Path
) -> None:
    run = make_run(root, None, model)
    run.mixing = MixingConfig(**mixing)
    with pytest.raises(UserError, match=problem):
        open_data(run, 0, 1, True)


def test_a_probe_needs_held_out_samples(root: Path) -> None:
    run = mixed(root, "router_load", signal="probe")
    run.data.domains["wiki"].valid_path = None
    with pytest.raises(UserError, match="wiki has none"):
        open_data(run, 0, 1, True)


def test_layers_are_chosen_by_name_or_number(root: Path) -> None:
    model = make_run(root, None, {"moe_dense_first_layers": 1}).model
    assert choose_layers("all", model) == (1, 2, 3)
    assert choose_layers("last", model) == (3,)
    assert choose_layers("3, 1", model) == (1, 3)
