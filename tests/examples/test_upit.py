"""examples/launch/upit.sh, from a dense model to a tuned Mixtral that transformers reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint.tiny import convert, save_llama
from commands import ROOT
from data.chats import write_conversations
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint import layout
from megatron_ext.data.conversation_stream import ConversationStream
from megatron_ext.recipe import parse_run

LENGTH, STEPS, VOCABULARY = 32, 4, 128
SCRIPT = ROOT / "examples" / "launch" / "upit.sh"
GRID = ["--device", "cpu", "--seq-length", LENGTH, "--global-batch-size", 4]


def upit(root: Path, **environment: Any) -> subprocess.CompletedProcess[str]:
    """The script on two ranks, a few steps each. Its import is done already."""
    short = [*GRID, "--train-iters", STEPS, "--lr", "3e-3", "--lr-warmup-iters", 1]
    sft = [*short, "--save-interval", 2, "--eval-interval", 0, "--eval-samples", 2]
    moe = [*short, "--eval-interval", 0, "--expert-model-parallel-size", 2]
    router = [*GRID, "--seed-fraction", 0.5, "--lr", "1e-2", "--expert-model-parallel-size", 2]
    options = {
        "SFT_OPTIONS": sft,
        "MOE_OPTIONS": [*moe, "--eval-samples", 2],
        "ROUTER_OPTIONS": router,
        "UPIT_OPTIONS": ["--skip-verify"],
    }
    words = {name: " ".join(map(str, values)) for name, values in options.items()}
    places = {"MODEL": root / "hf", "DATA": root / "data", "OUT": root / "out"}
    settings = {"PYTHON": sys.executable, "RANKS": 2, "EXPERTS": 4, **places, **words}
    return subprocess.run(
        ["bash", str(SCRIPT)],
        env=os.environ | {k: str(v) for k, v in (settings | environment).items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upit")
    save_llama(path / "hf", num_hidden_layers=2, vocab_size=VOCABULARY)
    dense = path / "out" / "dense"
    convert("import", "--source", path / "hf", "--output", dense, "--skip-verify")
    for split, number in (("train", 40), ("valid", 6)):
        folder = path / "data" / split
        folder.mkdir(parents=True)
        for first, name in ((0, "chat"), (64, "maths")):
            lengths = [6 + (5 * n + first) % 17 for n in range(number)]
            write_conversations(folder, name, lengths, first + 64, len(split), first)
    return path


def test_the_recipes_are_what_the_paper_says() -> None:
    """As far as is known: a checkpoint every quarter of the dense run's two epochs."""
    sft, moe = (
        parse_run(["--config", str(ROOT / "examples" / "recipes" / f"upit_{name}.yaml")])
        for name in ("sft", "moe")
    )
    assert sft.training.train_iters == 8 * sft.checkpoint.save_interval
    assert sft.checkpoint.keep_latest == 0 and moe.training.train_iters == sft.training.train_iters
    assert sft.optimizer.lr == moe.optimizer.lr == 2e-5
    assert moe.router.moe_balance_loss == "aux_loss"


def test_missing_settings_are_named() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: MODEL is not set\n  -> ")


def test_from_a_dense_model_to_mixtral(root: Path) -> None:
    done = upit(root)
    assert done.returncode == 0, done.stdout
    out = root / "out"
    assert layout.kept_iterations(out / "sft") == [2, 4]
    report = json.loads((out / "routed" / "router_init.json").read_text())
    assert sum(report["bucket_sizes"]) == report["samples"] == 40
    construction = layout.read_construction(out / "moe")
    assert construction is not None and construction["method"] == "upit"
    assert construction["router"]["init"] == "trained"
    assert len(construction["children"]["all"]) == 2

    # transformers reads the mixture, and finds the held-out loss that the run ended with.
    model = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert type(model).__name__ == "MixtralForCausalLM" and model.config.num_local_experts == 4
    rows = [json.loads(line) for line in (out / "moe" / "metrics.jsonl").read_text().splitlines()]
    (valid,) = [row for row in rows if row["kind"] == "valid"]
    assert valid["step"] == STEPS
    for name in ("chat", "maths"):
        stream = ConversationStream(root / "data" / "valid" / name, LENGTH, 1234, name)
        total, tokens = 0.0, 0
        for number in range(min(2, stream.num_samples)):
            row = stream.read(number)
            for ids, trained in zip(row.tokens, row.trained, strict=True):
                found, count = loss(model, torch.tensor(ids.tolist()), torch.tensor(trained))
                total, tokens = total + found, tokens + count
        assert total / tokens == pytest.approx(valid[f"loss/{name}"], abs=2e-4)

    # Given again, nothing is made again.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    done = upit(root, PYTHON="false")
    assert done.returncode == 0, done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    # A run that is not at its end is gone on with.
    recipe = yaml.safe_load((out / "moe" / "recipe.yaml").read_text())
    recipe["training"]["train_iters"] = STEPS + 1
    (out / "moe" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert upit(root, PYTHON="false").returncode != 0


def loss(model: Any, tokens: torch.Tensor, trained: torch.Tensor) -> tuple[float, int]:
    """Summed loss of a conversation's trained tokens, and their number."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:].long(), reduction="none")
    return float((losses * trained[1:]).sum()), int(trained[1:].sum())
