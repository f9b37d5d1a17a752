"""What static weights are made of, against the model run by hand, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, run
from ranks import run_ranks
from training.runs import DOMAINS, make_run, write_data

from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import make_strategy
from megatron_ext.mixing.strategies.distances import distance_weights
from megatron_ext.training import static_weights


def measure(root: Path, ranks: int) -> dict[str, Any]:
    """Features of both kinds; and, on one rank, mean logits of the held-out samples."""
    import torch

    from megatron_ext.data.loader import validation_batches
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer, write_recipe

    recipe = make_run(root, {"expert_model_parallel_size": ranks})
    recipe.mixing.layers, recipe.mixing.probe_samples = "all", recipe.data.eval_samples
    grid = grids.initialize(recipe)
    data = open_data(recipe, grid.data_rank, grid.data_size, True)
    trainer = Trainer(recipe, grid, data)
    loads = static_weights.gate_loads(trainer.passes, data)
    hidden = static_weights.hidden_states(trainer.passes, data)
    found: dict[str, Any] = {"loads": loads, "hidden": hidden}
    if ranks == 1:
        recipe.checkpoint.save = str(root / "moe")
        write_recipe(recipe, recipe.checkpoint.save, is_main=True)
        trainer.save()
        (model,) = trainer.model
        model.eval()
        logits = []
        with torch.no_grad():
            for name in data.names:
                rows = list(validation_batches(data.valid[name], 6, 1, 0, 1))
                shown = [model(r["tokens"], r["position_ids"], None).double() for r in rows]
                logits.append(torch.cat(shown).mean((0, 1)).numpy())
        found["logits"] = np.stack(logits)
        (weight,) = [p for n, p in model.named_parameters() if n.endswith("output_layer.weight")]
        found["output"] = weight.detach().double().numpy()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("static") / "train"
    path.mkdir()
    write_data(path)
    (path.parent / "valid").symlink_to(path)
    return path


@pytest.fixture(scope="module")
def found(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (one,) = run_ranks(1, measure, root, 1)
    two, other = run_ranks(2, measure, root, 2)
    assert np.array_equal(two["hidden"], other["hidden"])
    return one, two


def test_hidden_states_are_the_mean_over_tokens(found: Any) -> None:
    """Logits are linear in the last hidden state: the mean of one gives the mean of the other."""
    one, _ = found
    np.testing.assert_allclose(one["hidden"] @ one["output"].T, one["logits"], atol=1e-5)
    assert np.abs(one["hidden"][0] - one["hidden"][1]).max() > 1e-3


def test_the_grid_does_not_matter(found: Any) -> None:
    one, two = found
    assert one["loads"].shape == (len(DOMAINS), 4, 8)
    np.testing.assert_allclose(one["loads"].sum(-1), 1)
    np.testing.assert_allclose(one["loads"], two["loads"], atol=2e-3)
    np.testing.assert_allclose(one["hidden"], two["hidden"], atol=1e-5)


def test_the_tool_writes_weights_that_strategies_read(root: Path, found: Any) -> None:
    one, _ = found
    weights = root / "weights.jsonl"
    options = ["--load", root / "moe", "--data-dir", root.parent, "--seq-length", 32]
    options += ["--probe-samples", 6, "--micro-batch-size", 1, "--device", "cpu"]
    shown = run(ROOT / "tools" / "static_weights.py", "--by", "gate_load", "--output", weights,
                *options)  # fmt: skip
    names = sorted(DOMAINS)  # as a folder lists them
    strategy = make_strategy("static", names, {"initial": str(weights)})
    places = [DOMAINS.index(name) for name in names]
    expected = distance_weights(one["loads"][places, -1:])
    np.testing.assert_allclose(strategy.initial([1] * 3, [1] * 3), expected, rtol=1e-12)
    assert all(f"{weight:.4f}" in shown for weight in expected)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, {"tensor_model_parallel_size": 2})
    with pytest.raises(UserError, match="hidden states are read whole"):
        static_weights.check(recipe, "embedding", None)
    with pytest.raises(UserError, match="not a directory"):
        static_weights.check(recipe, "embedding", tmp_path / "nothing")
    static_weights.check(recipe, "gate_load", None)
    recipe.model.num_experts = None
    with pytest.raises(UserError, match="the model is dense"):
        static_weights.check(recipe, "gate_load", None)
