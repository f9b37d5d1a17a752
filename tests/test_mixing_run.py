"""Five domains of real text, blended by router loads on TP2xEP2; killed, and resumed on EP2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.tiny import convert, save_llama
from commands import ENVIRONMENT, ROOT, run, torchrun
from data.conftest import huggingface_directory, texts  # noqa: F401

from megatron_ext.data.blend import BlendPlan

STEPS, INTERVAL, LENGTH, BATCH, SEED = 24, 4, 64, 8, 1234


def real_text() -> dict[str, Iterator[str]]:
    """What every Python with torch has on disk: documents by domain."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    packages = Path(torch.__file__).parent
    read = {
        "code": sorted(library.glob("email/*.py")),
        "headers": sorted((packages / "include" / "c10" / "util").glob("*.h")),
        "licences": sorted(packages.parent.glob("*.dist-info/**/LICENSE*")),
        "tests": sorted((packages / "testing" / "_internal").glob("*.py")),
    }
    found = {
        name: (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        for name, paths in read.items()
    }
    return {**found, "manual": iter(topics.values())}


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory,
    huggingface_directory: Path,  # noqa: F811
) -> Path:
    """The run's directory after a SIGKILL of all its ranks and a resumption."""
    root = tmp_path_factory.mktemp("mixing")
    inputs = []
    for name, documents in real_text().items():
        chosen = islice((text[:20000] for text in documents if text.strip()), 12)
        lines = [json.dumps({"text": text}) for text in chosen]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        inputs.append(f"{name}={root / name}.jsonl")
    run(ROOT / "tools" / "preprocess_data.py", "--input", *inputs, "--output", root / "data",
        "--tokenizer", huggingface_directory / "tokenizer.json")  # fmt: skip
    save_llama(root / "dense", vocab_size=2048)
    convert("partition", "--source", root / "dense", "--output", root / "moe",
            "--num-experts", 4, "--skip-verify")  # fmt: skip
    recipe = ROOT / "examples" / "recipes" / "router_load.yaml"
    options = ["--config", recipe, "--load", root / "moe", "--data-dir", root / "data"]
    options += ["--save", root / "run", "--device", "cpu", "--seq-length", LENGTH]
    options += ["--global-batch-size", BATCH, "--micro-batch-size", 2, "--interval", INTERVAL]
    options += ["--train-iters", STEPS, "--save-interval", 5, "--eval-interval", 0]
    options += ["--eval-samples", 2, "--lr", "3e-3", "--lr-warmup-iters", 2, "--seed", SEED]
    job = list(map(str, options))
    killed = subprocess.Popen(
        [sys.executable, *torchrun(4), str(ROOT / "pretrain_moe.py"), *job],
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 250
    # After the second update, and a step that is in no checkpoint.
    while not any(row["step"] >= 12 for row in rows(root / "run", "train")):
        assert killed.poll() is None and time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    run(*torchrun(2), ROOT / "pretrain_moe.py", *job, "--tensor-model-parallel-size", 1)
    return root / "run"


def test_it_goes_on_where_it_was(resumed: Path) -> None:
    assert [row["step"] for row in rows(resumed, "train")] == list(range(1, STEPS + 1))
    updates = rows(resumed, "mixing")
    assert [row["step"] for row in updates] == list(range(INTERVAL, STEPS + 1, INTERVAL))
    weights = np.array([[v for k, v in row.items() if k[:7] == "weight/"] for row in updates])
    assert weights.shape == (len(updates), 5)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert np.all(np.ptp(weights, axis=0) > 1e-4), "every weight moved"


def test_no_sample_is_lost_or_repeated(resumed: Path) -> None:
    """The log alone gives what an uninterrupted run draws: the checkpoint's state is that."""
    log = [json.loads(line) for line in (resumed / "blend_weights.jsonl").read_text().splitlines()]
    state = json.loads((resumed / f"iter_{STEPS:07d}" / "run_state.json").read_text())["loader"]
    names = state["names"]
    assert names == sorted(names) and len(names) == 5
    plan = BlendPlan(names, state["num_samples"], [1] * 5, SEED)
    plan.replay({**entry, "weights": [entry["weights"][name] for name in names]} for entry in log)
    draws: dict[int, list[int]] = {domain: [] for domain in range(5)}
    for _ in range(STEPS):
        batch = plan.next_batch(BATCH)
        for domain, draw in zip(batch.domain.tolist(), batch.draw.tolist(), strict=True):
            draws[domain].append(draw)
    assert plan.drawn.tolist() == state["drawn"] and plan.credit.tolist() == state["credit"]
    assert all(sorted(drawn) == list(range(len(drawn))) for drawn in draws.values())
    assert sum(map(len, draws.values())) == STEPS * BATCH
