"""`convert_llama.py report`, and the reports that partition and upcycle leave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.experts import fingerprint
from megatron_ext.checkpoint.hf import open_weights
from megatron_ext.construction.statistics import LayerStatistics, write_layer, write_meta
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import convert, save_llama


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense") / "hf")


@pytest.fixture(scope="module")
def statistics(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_statistics(tmp_path_factory.mktemp("statistics"), hf)


def save_statistics(folder: Path, model: Path, inputs: int = 64) -> Path:
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        means = torch.randn(4, 48, generator=generator).double()
        importance = torch.rand(4, 96, generator=generator).double()
        values = LayerStatistics(torch.full((4,), 50), means, importance)
        values.inputs = torch.randn(inputs, 48, generator=generator)
        write_layer(folder, layer, values)
    write_meta(folder, fingerprint(open_weights(model)), [f"g{n}" for n in range(4)], 3)
    return folder


def make(command: str, hf: Path, output: Path, *options: Any) -> dict[str, Any]:
    convert(command, "--source", hf, "--output", output, "--skip-verify", *options)
    return read(output)


def report(hf: Path, moe: Path, *options: Any) -> dict[str, Any]:
    convert("report", "--source", moe, "--dense", hf, *options)
    return read(moe)


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return values


def test_a_partition_is_the_ffn_when_all_experts_are_there(
    hf: Path, statistics: Path, tmp_path: Path
) -> None:
    moe = tmp_path / "moe"
    options = ["--method", "gradient", "--num-experts", 4, "--statistics", statistics]
    found = make("partition", hf, moe, *options)
    assert found["inputs"] == 64 and len(found["layers"]) == 3
    assert found["mean"]["error_all"] < 1e-5 and found["mean"]["overlap"] == 0
    assert all(0.2 < row["error"] < 3 for row in found["layers"])
    assert all(row["norm_ratio"] > 0.2 for row in found["layers"])
    assert found["parameters"]["activated"] < found["parameters"]["dense"]
    text = (moe / "report.md").read_text()
    assert text.startswith("# gradient, seed 1234") and "![Layer by layer](report.png)" in text
    assert (moe / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(moe.glob(".*partial*"))


UPCYCLED: dict[str, tuple[list[Any], float]] = {
    "copies": (["--num-experts", 4], 1.0),
    "top-1": (["--num-experts", 4, "--moe-router-topk", 1, "--router-init", "zero"], 1.0),
    "virtual groups": (
        ["--method", "virtual_groups", "--granularity", 2, "--num-experts", 4],
        2 / 6,
    ),
    "virtual groups, fc2": (
        [
            *("--method", "virtual_groups", "--granularity", 2, "--num-experts", 4),
            *("--weight-scaling", "fc2"),
        ],
        2 / 6,
    ),
    "xft": (["--method", "xft", "--num-experts", 4], 1.0),
}


@pytest.mark.parametrize("name", UPCYCLED)
def test_copies_are_the_ffn(hf: Path, statistics: Path, tmp_path: Path, name: str) -> None:
    options, overlap = UPCYCLED[name]
    bare = make("upcycle", hf, tmp_path / "moe", *options)
    assert bare["inputs"] == 0 and "error" not in bare["layers"][0]
    assert bare["mean"]["overlap"] == pytest.approx(overlap)
    assert not (tmp_path / "moe" / "report.png").exists()
    found = report(hf, tmp_path / "moe", "--statistics", statistics, "--num-inputs", 40)
    assert found["inputs"] == 40 and (tmp_path / "moe" / "report.png").exists()
    for row in found["layers"]:
        assert row["error"] < 1e-5 and row["error_all"] < 1e-5
        assert row["norm_ratio"] == pytest.approx(1)


def test_experts_of_several_models_do_not_overlap(hf: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    options = ["--source", other, "--method", "branch_train_mix", "--num-experts", 4]
    for more in ([], ["--base", hf]):
        found = make("upcycle", hf, tmp_path / f"moe{len(more)}", *options, *more)
        assert found["mean"]["overlap"] == pytest.approx(2 / 6)


def test_a_layer_without_experts_has_no_row(hf: Path, statistics: Path, tmp_path: Path) -> None:
    options = ["--num-experts", 4, "--moe-dense-first-layers", 1]
    make("partition", hf, tmp_path / "moe", *options)
    found = report(hf, tmp_path / "moe", "--statistics", statistics, "--output", tmp_path / "out")
    assert "error" not in found["layers"][0]  # the mixture's own is as it was
    found = read(tmp_path / "out")
    assert [row["layer"] for row in found["layers"]] == [1, 2]
    assert found["mean"]["error_all"] < 1e-5


def test_perplexity_stands_in_the_report(hf: Path, tmp_path: Path) -> None:
    make("partition", hf, tmp_path / "moe", "--num-experts", 4)
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"perplexity": {"wiki": 10.5}}))
    after.write_text(json.dumps({"perplexity": {"wiki": 80.25}}))
    files = ["--dense-losses", before, "--losses", after]
    found = report(hf, tmp_path / "moe", *files)
    assert found["perplexity"] == {"wiki": {"before": 10.5, "after": 80.25}}
    assert "| wiki | 10.50 | 80.25 |" in (tmp_path / "moe" / "report.md").read_text()
    after.write_text(json.dumps({"perplexity": {"code": 1.0}}))
    with pytest.raises(UserError, match="are of different domains"):
        report(hf, tmp_path / "moe", *files)
    after.write_text("[]")
    with pytest.raises(UserError, match="is not what tools/evaluate.py prints"):
        report(hf, tmp_path / "moe", *files)
    with pytest.raises(UserError, match="takes two files"):
        report(hf, tmp_path / "moe", *files[:2])


def test_other_models_are_refused(hf: Path, tmp_path: Path) -> None:
    make("partition", hf, tmp_path / "moe", "--num-experts", 4)
    other = save_llama(tmp_path / "other", seed=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_statistics(foreign, other)
    with pytest.raises(UserError, match=re.escape("was not made of this dense model")):
        report(other, tmp_path / "moe")
    with pytest.raises(UserError, match="are of another model"):
        report(hf, tmp_path / "moe", "--statistics", foreign)
    convert("import", "--source", hf, "--output", tmp_path / "dense")
    with pytest.raises(UserError, match="does not say how its experts were made"):
        report(hf, tmp_path / "dense")
