"""tools/plan.py on a small recipe: what it prints, what it refuses, where it sends the user."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.planning.command import DOES_NOT_FIT, plan

RECIPE = """# world_size: 16
model:
  num_layers: 4
  hidden_size: 256
  ffn_hidden_size: 512
  num_attention_heads: 4
  vocab_size: 512
  max_position_embeddings: 512
  num_experts: 2
parallel:
  expert_model_parallel_size: 2
data:
  seq_length: 512
training:
  micro_batch_size: 4
  global_batch_size: 128
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_a_plan_adds_up(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert plan(["--config", recipe, "--gpu", "a100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "16 x A100, 2 nodes: expert 2, data 16; 2 micro-batches of 4 x 512" in printed
    assert "Nothing was measured on a GPU" in printed
    figures = json.loads(out.read_text())
    [stage] = figures["stages"]
    # bf16 weights, fp32 gradients (buffers are padded for their shards), 12 bytes of optimizer
    # state, the dense part's shared out over 16 ranks and the experts' over 8.
    assert stage["weights"] == pytest.approx(2 * stage["parameters"], rel=1e-2)
    assert stage["gradients"] == pytest.approx(4 * stage["parameters"], rel=1e-2)
    expert = 4 * 3 * 256 * 256
    state = 12 * (expert / 8 + (stage["parameters"] - expert) / 16)
    assert stage["optimizer"] == pytest.approx(state, rel=2e-2)
    kinds = ("weights", "gradients", "optimizer", "activations")
    assert sum(stage[kind] for kind in kinds) == stage["peak"]
    assert figures["step_seconds"] == pytest.approx(sum(figures["times"].values()))
    peak_flops = 16 * 312e12 * figures["step_seconds"]
    assert figures["mfu"] == pytest.approx(figures["model_flops"] / peak_flops)
    # Groups of data parallelism cross nodes, pairs of expert parallelism do not.
    crossing = {(row["group"], row["between_nodes"]) for row in stage["traffic"]}
    assert ("data", True) in crossing and ("expert", False) in crossing
    assert ("expert", True) not in crossing


def test_what_does_not_fit_is_sent_to_the_nearest_grid_that_does(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", recipe, "--gpu", "a100-40g", "--usable-memory", "0.0012"]
    assert plan(arguments) == DOES_NOT_FIT
    printed = capsys.readouterr().out
    assert "DOES NOT FIT: 0." in printed and "of 0.048 GB" in printed
    found = re.search(r"the nearest grid that fits: (.*), micro_batch_size (\d)", printed)
    assert found and found[1].startswith("expert 2")
    arguments += ["--micro-batch-size", found[2]]
    if "recompute full" in found[1]:
        arguments += ["--recompute-granularity", "full"]
    assert plan(arguments) == 0
    assert "\nfits: " in capsys.readouterr().out


def test_what_cannot_be_is_refused_with_its_sum(recipe: str) -> None:
    with pytest.raises(UserError, match="gpu=h10 is not known(.|\n)*h100"):
        plan(["--config", recipe, "--gpu", "h10"])
    with pytest.raises(UserError, match="number of GPUs is not known"):
        plan([])
    with pytest.raises(UserError, match="is not a multiple(.|\n)*the nearest grid that fits: "):
        plan(["--config", recipe, "--pipeline-model-parallel-size", "3"])
