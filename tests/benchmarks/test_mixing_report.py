"""The mixing study's report says what its raw results say, and leaves alone what people wrote."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_ext.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("code", "math", "chat")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("mixing_report")


def run(strategy: str, seed: int, shift: float, decides: bool = False) -> dict[str, Any]:
    """Seeds differ by far more than strategies; `code` gains what `math` loses."""
    loss = {"code": 3.0 + seed - 0.3, "math": 2.0 + seed + 0.3, "chat": 1.0 + seed + 3 * shift}
    decision = {
        "step": 8,
        "weights": {"code": 0.5, "math": 0.3, "chat": 0.2},
        "distance": {"code": 0.2, "math": 0.1, "chat": 0.15},
        "loads": [[0.5, 0.5], [0.4, 0.6], [0.3, 0.7]],
    }
    return {
        "strategy": strategy,
        "seed": seed,
        "loss": loss,
        "trained_tokens": 1000,
        "cpu": 6.0,
        "decisions": [decision, {**decision, "step": 16}] if decides else [],
    }


def write_results(folder: Path) -> None:
    part = {"documents": 10, "tokens": 200, "trained_tokens": 50}
    base = {"num_layers": 2, "hidden_size": 8, "vocab_size": 64, "seq_length": 16}
    base |= {"num_experts": 4, "moe_router_topk": 2, "domains": ["wiki"], "global_batch_size": 4}
    settings = {
        "study": {"steps": 16, "interval": 8, "global_batch_size": 8, "lr": 1e-3,
                  "eval_samples": 4, "quick": False},
        "base": base | {"dense_iters": 10, "moe_iters": 5},
        "data": {name: {"train": part, "valid": part, "cut": 0} for name in NAMES},
    }  # fmt: skip
    rows = [settings]
    for seed in (1, 2, 3):
        rows += [run("uniform", seed, 0.0), run("router_load", seed, 0.001 * (seed - 2), True)]
        rows += [run("load_progress", seed, -0.1 - 0.001 * seed, True)]
    rows.append(run("random", 1, 0.5, True))
    (folder / "mixing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_says_what_the_results_say(reports: ModuleType, tmp_path: Path) -> None:
    write_results(tmp_path)
    path = reports.write_report(tmp_path)
    text = path.read_text()
    assert "- `router_load` cannot be told from `uniform`: +0.0000 [-0.0025, +0.0025]" in text
    assert "- `load_progress` better than `uniform`: -0.1020 [-0.1045, -0.0995], 3 seeds" in text
    assert "| random | 1 | " in text and "+0.5000 [one seed]" in text
    assert "our rule beats the paper's | load_progress - router_load | -0.1020" in text
    assert "3 of 3 | holds here |" in text
    assert "| router_load | 0.500 (0.500-0.500) | 0.300 (0.300-0.300) | 0.200" in text
    drawn = {picture.name: picture.read_bytes() for picture in (tmp_path / "img").iterdir()}
    assert drawn.keys() == {
        f"mixing_{name}.svg" for name in ("differences", "weights", "decisions")
    }
    assert all(f"](img/{name})" in text for name in drawn)

    # Again, after someone has written around the generated part: that stays, and it is made anew.
    generated = text.partition("compared")[2].replace("-0.1020", "-0.9999")
    path.write_text(f"# Mine\n\nAn answer.\n\n{generated}\nA remark.\n")
    again = reports.write_report(tmp_path).read_text()
    assert again.startswith("# Mine\n\nAn answer.\n") and again.endswith("\nA remark.\n")
    assert "-0.9999" not in again and again.count("## What was run") == 1
    assert {picture.name: picture.read_bytes() for picture in (tmp_path / "img").iterdir()} == drawn


def test_results_without_the_baseline_are_refused(reports: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        reports.write_report(tmp_path)
    (tmp_path / "mixing.jsonl").write_text("{}\n" + json.dumps(run("random", 1, 0.0)) + "\n")
    with pytest.raises(UserError, match="uniform"):
        reports.write_report(tmp_path)
