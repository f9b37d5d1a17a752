"""The main job as a user runs it: convert, train with torchrun, go on, export, read back."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.tiny import convert, save_llama
from training.runs import DOMAINS, VOCABULARY, write_data

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def pretrain(*options: Any) -> str:
    """Run pretrain_moe.py on two ranks; what it printed."""
    # Nothing may ask the network: wandb writes its files, the hub is off.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(ROOT / "pretrain_moe.py"), *map(str, options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of 4 steps on EP2, gone on with to 6, and exported."""
    root = tmp_path_factory.mktemp("job")
    for split in ("train", "valid"):
        (root / "data" / split).mkdir(parents=True)
        write_data(root / "data" / split)
    save_llama(root / "dense", vocab_size=VOCABULARY)
    convert("partition", "--source", root / "dense", "--output", root / "moe",
            "--num-experts", 4, "--skip-verify")  # fmt: skip
    options = ["--load", root / "moe", "--save", root / "run", "--data-dir", root / "data"]
    options += ["--expert-model-parallel-size", 2, "--device", "cpu", "--seq-length", 32]
    options += ["--global-batch-size", 4, "--lr", "1e-3", "--lr-warmup-iters", 2]
    options += ["--lr-decay-iters", 6, "--eval-samples", 4, "--eval-at-start", True]
    options += ["--wandb-project", "x", "--peak-tflops", 0.05]
    said = [pretrain(*options, "--train-iters", steps) for steps in (4, 6)]
    convert("export", "--source", root / "run", "--output", root / "hf")
    return root, said


def metrics(root: Path, kind: str) -> list[dict[str, Any]]:
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def test_metrics_of_every_step(finished: tuple[Path, list[str]]) -> None:
    root, _ = finished
    rows = metrics(root, "train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    warm_up = [5e-4, 1e-3]
    assert [row["lr"] for row in rows[:2]] == pytest.approx(warm_up)
    for row in rows:
        assert row["tokens"] == 4 * 32
        assert 0 < row["loss"] < 2 * math.log(VOCABULARY)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu"] == pytest.approx(row["tflops_per_rank"] / 0.05)
        assert row["grad_norm"] > 0 and row["aux_loss"] > 0 and row["load_spread"] >= 1
        losses = [value for name, value in row.items() if name.startswith("loss/")]
        assert losses and min(losses) <= row["loss"] <= max(losses)
    epochs = {name: rows[-1][f"epochs/{name}"] for name in DOMAINS}
    # 24 samples over three domains of 149 (4,799 tokens / 32), weighted alike.
    assert epochs == pytest.approx(dict.fromkeys(DOMAINS, 8 / 149))
    valid = metrics(root, "valid")
    assert [row["step"] for row in valid] == [0, 4, 6]
    for row in valid:
        for name in DOMAINS:
            assert row[f"perplexity/{name}"] == pytest.approx(math.exp(row[f"loss/{name}"]))
    assert valid[-1]["loss"] < valid[0]["loss"]


def test_what_the_run_directory_holds(finished: tuple[Path, list[str]]) -> None:
    root, (first, second) = finished
    folder = root / "run"
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    assert {path.name for path in folder.glob("iter_*")} == {"iter_0000004", "iter_0000006"}
    for name in ("model.yaml", "recipe.yaml", "construction.json", "iter_0000006/run_state.json"):
        assert (folder / name).is_file(), name
    offline = list((folder / "wandb").glob("offline-run-*"))
    states = [json.loads((folder / f"iter_000000{n}/run_state.json").read_text()) for n in (4, 6)]
    assert states[0]["wandb_id"] == states[1]["wandb_id"]  # both halves are one curve
    assert offline and all(states[0]["wandb_id"] in path.name for path in offline)
    assert "step 4/4" in first and "experts over 2 ranks" in first
    assert "iteration 4" in second and "step 5/6" in second and "step 4/" not in second


def test_the_exported_run_is_read_by_transformers(finished: tuple[Path, list[str]]) -> None:
    """Its loss on the held-out text, by transformers, is the last one that training reported."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoModelForCausalLM

    root, _ = finished
    model = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32).eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    reported = metrics(root, "valid")[-1]
    for name in DOMAINS:
        dataset = IndexedDataset(str(root / "data" / "valid" / name))
        stream = torch.cat([torch.from_numpy(dataset[i].astype("int64")) for i in range(4)])
        inputs, labels = stream[:128].view(4, 32), stream[1:129].view(4, 32)
        with torch.no_grad():
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert loss.item() == pytest.approx(reported[f"loss/{name}"], rel=1e-3)
