"""convert_llama.py upcycle and merge, from the command line to what models compute."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_ext.checkpoint import layout, verify
from megatron_ext.checkpoint.experts import fingerprint
from megatron_ext.checkpoint.hf import open_weights
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import EXPERTS_FC1, ROUTER, layer_key
from megatron_ext.construction.statistics import LayerStatistics, write_layer, write_meta
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import convert, save_llama

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_llama(tmp_path_factory.mktemp("dense") / "hf")
    # torch lists its tensor factories when it first builds on meta: that list must not be made
    # after they are wrapped for megatron-core on the CPU.
    LlamaForCausalLM.from_pretrained(path)
    return path


def upcycle(source: Path, output: Path, *options: Any) -> CheckpointWeights:
    convert("upcycle", "--source", source, "--output", output, *options)
    return CheckpointWeights(output)


def step_zero_error(capsys: Output) -> float:
    found = re.search(r"logits at step 0 .* relative error (\S+)", capsys.readouterr().out)
    assert found is not None
    return float(found[1])


EXACT: dict[str, list[Any]] = {
    "copies": ["--num-experts", 4, "--moe-layer-freq", 0, 1, 1],
    "copies, top-3": ["--num-experts", 4, "--moe-router-topk", 3, "--moe-gate", "mlp"],
    "copies, top-1": ["--num-experts", 4, "--moe-router-topk", 1, "--router-init", "zero"],
    "virtual groups": [
        *("--method", "virtual_groups", "--granularity", 4),
        *("--num-experts", 12, "--moe-router-topk", 8),
    ],
    "virtual groups, fc2": [
        *("--method", "virtual_groups", "--granularity", 3, "--weight-scaling", "fc2"),
        *("--num-experts", 6, "--moe-router-topk", 3, "--moe-gate", "mlp"),
    ],
    "xft": ["--method", "xft", "--num-experts", 3, "--moe-dense-last-layers", 1],
}


@pytest.mark.parametrize("name", EXACT)
def test_step_zero_is_the_dense_model(hf: Path, tmp_path: Path, name: str, capsys: Output) -> None:
    upcycle(hf, tmp_path / "moe", *EXACT[name])
    assert step_zero_error(capsys) <= 1e-5
    # Against transformers too, on another prompt.
    checkpoint = CheckpointWeights(tmp_path / "moe")
    tokens = verify.prompt(checkpoint.model, 100)
    ours = verify.load(verify.build_model(checkpoint.model), checkpoint.folder)
    theirs = verify.hf_logits(LlamaForCausalLM.from_pretrained(hf), tokens)
    assert verify.relative_error(verify.logits(ours, tokens), theirs) <= 1e-4


ROUGH: dict[str, list[Any]] = {
    "noise": ["--noise", 0.02],
    "drop_upcycling": ["--method", "drop_upcycling", "--drop-ratio", 0.1],
    "cube root": [
        *("--method", "virtual_groups", "--granularity", 2),
        *("--weight-scaling", "cube_root"),
    ],
    "top-1": ["--moe-router-topk", 1],
}


@pytest.mark.parametrize("name", ROUGH)
def test_other_starts_report_their_error(
    hf: Path, tmp_path: Path, name: str, capsys: Output
) -> None:
    upcycle(hf, tmp_path / "moe", "--num-experts", 4, *ROUGH[name])
    assert 1e-4 < step_zero_error(capsys) < 1


def test_a_wrong_copy_does_not_pass(hf: Path, tmp_path: Path) -> None:
    """Even where no token chooses the expert at step 0."""
    upcycle(hf, tmp_path / "other", "--num-experts", 4, "--noise", 0.1, "--skip-verify")
    with pytest.raises(UserError, match="upcycled model against the dense one: logits differ"):
        verify.check_upcycled(open_weights(hf), tmp_path / "other", exact=True)


def test_construction_is_described(hf: Path, tmp_path: Path, capsys: Output) -> None:
    options = ["--method", "drop_upcycling", "--drop-ratio", 0.25, "--seed", 9, "--num-experts", 2]
    upcycle(hf, tmp_path / "moe", *options, "--skip-verify")
    construction = layout.read_construction(tmp_path / "moe")
    assert construction == {
        "method": "drop_upcycling",
        "seed": 9,
        "options": {"drop_ratio": 0.25, "drop_indices": "shared"},
        "router": {"gate": "linear", "init": "normal", "std": 0.02},
        "sources": [{"name": "hf", "fingerprint": fingerprint(open_weights(hf))}],
    }
    capsys.readouterr()
    convert("inspect", "--source", tmp_path / "moe")
    out = capsys.readouterr().out
    assert "drop_upcycling, seed 9" in out and "from        hf" in out


def test_branch_train_mix_of_one_model_is_that_model(hf: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(hf, twin)
    moe = upcycle(hf, tmp_path / "moe", "--source", twin, "--method", "branch_train_mix")
    assert moe.model.num_experts == 2
    assert verify.check_upcycled(open_weights(hf), moe.path, exact=True) <= 1e-5


def test_branch_train_mix_takes_experts_from_each(hf: Path, tmp_path: Path, capsys: Output) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    options = ["--source", other, "--method", "branch_train_mix", "--base", hf]
    moe = upcycle(hf, tmp_path / "moe", *options)
    assert capsys.readouterr().out.count("logits at step 0 against") == 2
    fc1 = moe.tensor(layer_key(1, EXPERTS_FC1))
    for expert, source in enumerate((hf, other)):
        assert torch.equal(fc1[expert], torch.cat(open_weights(source).gate_up(1)))


def save_statistics(folder: Path, model: Path, groups: int) -> Path:
    """What tools/collect_statistics.py leaves: means of some hidden states."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        mean = torch.randn(groups, 48, generator=generator, dtype=torch.float64) + 1
        write_layer(folder, layer, LayerStatistics(torch.full((groups,), 100), mean))
    names = [f"group{number}" for number in range(groups)]
    write_meta(folder, fingerprint(open_weights(model)), names, 3)
    return folder


def test_routers_start_from_data(hf: Path, tmp_path: Path, capsys: Output) -> None:
    statistics = save_statistics(tmp_path / "statistics", hf, 4)
    data = ["--router-init", "data", "--statistics", statistics]
    moe = upcycle(hf, tmp_path / "moe", "--num-experts", 4, *data)
    assert step_zero_error(capsys) <= 1e-5
    router = moe.tensor(layer_key(1, ROUTER))
    assert router.shape == (4, 48) and router.sum(0).abs().max() < 1e-5
    with pytest.raises(UserError, match="hold 4 groups, the routers need 8"):
        upcycle(hf, tmp_path / "no", *data)
    with pytest.raises(UserError, match="are of another model"):
        upcycle(save_llama(tmp_path / "other", seed=3), tmp_path / "no", "--num-experts", 4, *data)
    assert not (tmp_path / "no").exists()


def test_xft_there_and_back(hf: Path, tmp_path: Path, capsys: Output) -> None:
    moe = upcycle(hf, tmp_path / "moe", "--method", "xft", "--num-experts", 3)
    with pytest.raises(UserError, match="merge the experts into a dense model first"):
        convert("export", "--source", moe.path, "--output", tmp_path / "no")
    coefficients = tmp_path / "coefficients.json"
    coefficients.write_text(json.dumps([[0.0, 1.0, 2.0]] * 3))
    options = ["--shared-weight", 0.6, "--coefficients", coefficients]
    convert("merge", "--source", moe.path, "--output", tmp_path / "dense", *options)
    found = re.search(r"they differ by (\S+)", capsys.readouterr().out)
    assert found is not None and float(found[1]) <= 1e-5
    convert("export", "--source", tmp_path / "dense", "--output", tmp_path / "back")
    before, after = (LlamaForCausalLM.from_pretrained(p) for p in (hf, tmp_path / "back"))
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    coefficients.write_text("{")
    with pytest.raises(UserError, match="is not a JSON list"):
        convert("merge", "--source", moe.path, "--output", tmp_path / "no", *options)


@pytest.mark.parametrize("name", ["copies", "copies, top-3", "virtual groups"])
def test_exports_to_transformers(hf: Path, tmp_path: Path, name: str, capsys: Output) -> None:
    linear = [option if option != "mlp" else "linear" for option in EXACT[name]]
    upcycle(hf, tmp_path / "moe", *linear, "--skip-verify")
    convert("export", "--source", tmp_path / "moe", "--output", tmp_path / "out")
    assert "transformers' logits against the checkpoint" in capsys.readouterr().out
    tokens = verify.prompt(open_weights(hf).model, 100)
    found = [verify.hf_model(place, torch.float32) for place in (tmp_path / "out", hf)]
    architecture = "Qwen2Moe" if name == "copies" else "Mixtral"  # dense layers, or none
    assert type(found[0]).__name__ == f"{architecture}ForCausalLM"
    assert verify.relative_error(*(verify.hf_logits(model, tokens) for model in found)) <= 1e-4


MISTAKES: list[tuple[list[Any], str]] = [
    (["--granularity", 2], "granularity has no meaning for method copies"),
    (["--method", "xft", "--drop-ratio", 0.2], "drop_ratio has no meaning for method xft"),
    (["--method", "virtual_groups"], "granularity=1 must be at least 2"),
    (
        ["--method", "virtual_groups", "--granularity", 4],
        "moe_router_topk=2 is not a multiple of granularity=4",
    ),
    (
        ["--method", "virtual_groups", "--granularity", 5, "--moe-router-topk", 5],
        "granularity=5 does not divide ffn_hidden_size=96",
    ),
    (
        ["--method", "virtual_groups", "--granularity", 2, "--num-experts", 5],
        "granularity=2 does not divide num_experts=5",
    ),
    (
        ["--method", "virtual_groups", "--granularity", 2, "--router-init", "zero"],
        "cannot tell replicas apart",
    ),
    (["--method", "branch_train_mix"], "takes several sources, not 1"),
    (["--method", "drop_upcycling", "--drop-ratio", 1.5], "drop_ratio=1.5 must lie between"),
    (["--noise", -1], "must not be negative"),
    (["--router-init", "data"], "router_init=data needs statistics"),
    (["--moe-layer-freq", 1, 0], "moe_layer_freq has 2 values for 3 layers"),
    (["--moe-router-topk", 9], "moe_router_topk=9 must lie between 1 and num_experts=8"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_found_before_any_work(
    hf: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        upcycle(hf, tmp_path / "moe", *options)
    assert not list(tmp_path.iterdir())


def test_other_architectures_and_full_outputs_are_refused(hf: Path, tmp_path: Path) -> None:
    wide = save_llama(tmp_path / "wide", intermediate_size=192)
    with pytest.raises(UserError, match="ffn_hidden_size is 96 and 192"):
        upcycle(hf, tmp_path / "moe", "--source", wide, "--method", "branch_train_mix")
    with pytest.raises(UserError, match="takes one source, not 2"):
        upcycle(hf, tmp_path / "moe", "--source", wide)
    with pytest.raises(UserError, match="is not empty"):
        upcycle(hf, wide)
    with pytest.raises(UserError, match="source .*nowhere does not exist"):
        upcycle(tmp_path / "nowhere", tmp_path / "moe")
