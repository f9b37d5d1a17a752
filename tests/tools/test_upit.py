"""convert_llama.py upit, from the command line to what models compute."""

from __future__ import annotations

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
from megatron_ext.checkpoint.tensors import (
    EMBEDDING,
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FC2,
    QKV,
    ROUTER,
    layer_key,
)
from megatron_ext.checkpoint.writer import write_weights
from megatron_ext.construction.expansion import Merge, dissimilarity
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import convert, save_llama
from tests.tools.test_upcycle import save_statistics, step_zero_error

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_llama(tmp_path_factory.mktemp("base") / "hf")
    LlamaForCausalLM.from_pretrained(path)  # as in test_upcycle.py
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dense run leaves: iterations 10, 20 and 30."""
    root = tmp_path_factory.mktemp("tuned")
    for iteration in (10, 20, 30):
        weights = open_weights(save_llama(root / f"hf{iteration}", seed=iteration))
        layout.write_model_config(root, weights.model)
        write_weights(layout.iteration_dir(root, iteration), weights)
    layout.write_latest(root, 30)
    return root


def upit(base: Path, sources: list[Any], output: Path, *options: Any) -> CheckpointWeights:
    given = [option for source in sources for option in ("--source", source)]
    convert("upit", "--base", base, *given, "--output", output, *options)
    return CheckpointWeights(output)


def ffn(weights: Any, layer: int) -> list[torch.Tensor]:
    return [weights.tensor(layer_key(layer, name)) for name in (FC1, FC2)]


def experts(weights: Any, layer: int) -> list[torch.Tensor]:
    return [weights.tensor(layer_key(layer, name)) for name in (EXPERTS_FC1, EXPERTS_FC2)]


def test_checkpoints_and_children_become_experts(hf: Path, run: Path, tmp_path: Path) -> None:
    options = ["--iterations", "10,20,30", "--num-experts", 6, "--seed", 9, "--dare-drop", 0.25]
    options.append("--child-joins")
    moe = upit(hf, [run], tmp_path / "moe", *options)
    assert moe.model.num_experts == 6 and moe.model.moe_layers == [0, 1, 2]
    opened = [CheckpointWeights(run, iteration) for iteration in (10, 20, 30)]
    base = open_weights(hf)

    construction = layout.read_construction(moe.path)
    assert construction is not None
    assert construction["method"] == "upit" and construction["seed"] == 9
    assert construction["options"] == {
        "merge": "dare",
        "dare_drop": 0.25,
        "dare_mask": "each",
        "merge_scale": 1.0,
        "alpha_concentration": 1.0,
        "parents": "dissimilar",
        "similarity": "cosine",
        "scope": "model",
        "child_joins": True,
        "repeat_pairs": False,
        "rest": "last",
        "base": "hf",
    }
    names = [f"{run.name}@{iteration}" for iteration in (10, 20, 30)] + ["hf"]
    prints = [fingerprint(weights) for weights in (*opened, base)]
    assert construction["sources"] == [
        {"name": name, "fingerprint": fingerprint}
        for name, fingerprint in zip(names, prints, strict=True)
    ]
    children = construction["children"]["all"]
    assert len(children) == 3

    # The first parents are the least alike, by the FFNs of all layers.
    flat = torch.stack(
        [
            torch.cat(
                [
                    (tensor.double() - start).flatten()
                    for layer in range(3)
                    for tensor, start in zip(ffn(w, layer), ffn(base, layer), strict=True)
                ]
            )
            for w in opened
        ]
    )
    matrix = torch.tensor(construction["gram"]["all"], dtype=torch.float64)
    torch.testing.assert_close(matrix, flat @ flat.T, rtol=1e-10, atol=0)
    apart = dissimilarity(matrix, "cosine")
    first = children[0]["parents"]
    assert apart[first[0], first[1]] == apart.max()

    # What is recorded is enough to make the children again.
    for layer in range(3):
        fc1, fc2 = experts(moe, layer)
        for expert, weights in enumerate(opened):
            assert torch.equal(fc1[expert], ffn(weights, layer)[0])
            assert torch.equal(fc2[expert], ffn(weights, layer)[1])
        start = ffn(base, layer)[1]
        for number, child in enumerate(children):
            assert child["alpha"] + child["beta"] == pytest.approx(1)
            deltas = [fc2[parent] - start for parent in child["parents"]]
            key = (9, number, layer, 3)
            merged = Merge("dare", 0.25).apply(deltas, (child["alpha"], child["beta"]), key)
            assert torch.equal(fc2[3 + number], start + merged)
    assert (moe.path / "report.md").is_file()


def test_runs_are_named_in_three_ways(hf: Path, run: Path, tmp_path: Path) -> None:
    options = ["--num-experts", 4, "--skip-verify"]
    ways = {
        "at": ([f"{run}@10", f"{run}@20", f"{run}@30"], []),
        "numbers": ([run], ["--iterations", "10,20,30"]),
        "all": ([run], ["--iterations", "all"]),
    }
    made = [upit(hf, given, tmp_path / n, *more, *options) for n, (given, more) in ways.items()]
    files = [
        {file.name: file.read_bytes() for file in sorted(moe.folder.iterdir())} for moe in made
    ]
    assert files[0] == files[1] == files[2] and len(files[0]) > 20
    constructions = [(moe.path / layout.CONSTRUCTION_FILE).read_bytes() for moe in made]
    assert len(set(constructions)) == 1
    other = upit(hf, [run], tmp_path / "other", "--iterations", "all", *options, "--seed", 1)
    assert {f.name: f.read_bytes() for f in sorted(other.folder.iterdir())} != files[0]


def copies(model: Path, folder: Path, number: int) -> list[Path]:
    places = [folder / f"copy{n}" for n in range(number)]
    for place in places:
        shutil.copytree(model, place)
    return places


@pytest.mark.parametrize("topk", [1, 2])
def test_identical_checkpoints_are_the_dense_model(
    hf: Path, tmp_path: Path, topk: int, capsys: Output
) -> None:
    """Which the base is as well: nothing was learnt that DARE could rescale."""
    options = ["--num-experts", 5, "--router-init", "zero", "--moe-router-topk", topk]
    moe = upit(hf, copies(hf, tmp_path, 3), tmp_path / "moe", *options)
    assert step_zero_error(capsys) <= 1e-5
    dense = open_weights(hf)
    for layer in range(3):
        for found, expected in zip(experts(moe, layer), ffn(dense, layer), strict=True):
            assert all(torch.equal(expert, expected) for expert in found)
    assert verify.check_upcycled(dense, moe.path, exact=True) <= 1e-5


@pytest.mark.parametrize("merge", ["average", "task_arithmetic"])
def test_identical_checkpoints_of_another_base(hf: Path, tmp_path: Path, merge: str) -> None:
    base = save_llama(tmp_path / "base", seed=1)
    options = ["--num-experts", 4, "--merge", merge, "--skip-verify"]
    moe = upit(base, copies(hf, tmp_path, 2), tmp_path / "moe", *options)
    assert verify.check_upcycled(open_weights(hf), moe.path, exact=True) <= 1e-5
    tokens = verify.prompt(moe.model, 100)
    ours = verify.load(verify.build_model(moe.model), moe.folder)
    theirs = verify.hf_logits(LlamaForCausalLM.from_pretrained(hf), tokens)
    assert verify.relative_error(verify.logits(ours, tokens), theirs) <= 1e-4


def test_the_rest_is_from_the_last_the_base_or_the_mean(
    hf: Path, run: Path, tmp_path: Path
) -> None:
    models = [CheckpointWeights(run, 10), CheckpointWeights(run, 30)]
    for key in (EMBEDDING, layer_key(1, QKV)):
        tensors = [model.tensor(key) for model in models]
        expected = {
            "last": tensors[1],
            "base": open_weights(hf).tensor(key),
            "average": (tensors[0] + tensors[1]) / 2,
        }
        for rest, tensor in expected.items():
            options = ["--num-experts", 2, "--rest", rest, "--skip-verify", "--force"]
            moe = upit(hf, [f"{run}@10", f"{run}@30"], tmp_path / rest, *options)
            torch.testing.assert_close(moe.tensor(key), tensor, rtol=1e-7, atol=1e-7)


def test_each_layer_can_choose_its_own_parents(hf: Path, run: Path, tmp_path: Path) -> None:
    options = ["--iterations", "all", "--num-experts", 4, "--scope", "layer", "--skip-verify"]
    moe = upit(hf, [run], tmp_path / "moe", *options, "--similarity", "l2")
    construction = layout.read_construction(moe.path)
    assert construction is not None and list(construction["children"]) == ["0", "1", "2"]
    assert len({plan[0]["alpha"] for plan in construction["children"].values()}) == 3
    for layer, (child,) in construction["children"].items():
        matrix = torch.tensor(construction["gram"][layer], dtype=torch.float64)
        apart = dissimilarity(matrix, "l2")
        assert apart[child["parents"][0], child["parents"][1]] == apart.max()


def test_ties_and_random_parents(hf: Path, run: Path, tmp_path: Path) -> None:
    options = ["--iterations", "all", "--num-experts", 5, "--merge", "ties", "--ties-share", 0.5]
    options.append("--child-joins")
    with pytest.raises(UserError, match="how similar a child of merge=ties is"):
        upit(hf, [run], tmp_path / "no", *options)
    moe = upit(hf, [run], tmp_path / "moe", *options, "--parents", "random", "--skip-verify")
    construction = layout.read_construction(moe.path)
    assert construction is not None and construction["gram"] == {}
    assert "similarity" not in construction["options"]
    fc2, start = experts(moe, 1)[1], ffn(open_weights(hf), 1)[1]
    child = construction["children"]["all"][1]
    deltas = [fc2[parent] - start for parent in child["parents"]]
    merged = Merge("ties", share=0.5).apply(deltas, (child["alpha"], child["beta"]), (0, 0, 0, 0))
    assert torch.equal(fc2[4], start + merged)


def test_routers_start_from_data(hf: Path, run: Path, tmp_path: Path) -> None:
    last = tmp_path / "last"
    convert("export", "--source", run, "--output", last, "--skip-verify")
    options = ["--iterations", "10,30", "--num-experts", 4, "--router-init", "data"]
    statistics = save_statistics(tmp_path / "statistics", last, 4)
    moe = upit(hf, [run], tmp_path / "moe", *options, "--statistics", statistics, "--skip-verify")
    router = moe.tensor(layer_key(1, ROUTER))
    assert router.shape == (4, 48) and router.sum(0).abs().max() < 1e-5
    with pytest.raises(UserError, match="are of another model"):
        upit(hf, [run], tmp_path / "no", *options, "--statistics", statistics, "--rest", "base")


def test_transformers_reads_the_mixture(hf: Path, run: Path, tmp_path: Path) -> None:
    upit(hf, [run], tmp_path / "moe", "--iterations", "all", "--num-experts", 4, "--skip-verify")
    convert("export", "--source", tmp_path / "moe", "--output", tmp_path / "out")
    model = verify.hf_model(tmp_path / "out", torch.float32)
    assert type(model).__name__ == "MixtralForCausalLM" and model.config.num_local_experts == 4


FOUR = ["--iterations", "all", "--num-experts", 4]
MISTAKES: list[tuple[list[Any], str]] = [
    (["--iterations", "30", "--num-experts", 4], "there is only 1"),
    (["--num-experts", 4], "there is only 1"),
    (["--iterations", "all", "--num-experts", 2], "num_experts=2 is less than the 3 checkpoints"),
    (["--iterations", "10,40", "--num-experts", 4], "holds no iteration 40\n.* 10, 20, 30"),
    (["--iterations", "10,10", "--num-experts", 4], "@10 is given twice"),
    (["--iterations", "10-20", "--num-experts", 4], "10-20 are not numbers separated by commas"),
    (["--source", "other", "--iterations", "10", "--num-experts", 4], "iterations are of one run"),
    ([*FOUR, "--merge", "ties", "--dare-drop", 0.2], "dare_drop"),
    ([*FOUR, "--ties-share", 0.3], "ties_share has no meaning"),
    ([*FOUR, "--dare-drop", 1], "dare_drop=1.0 must lie"),
    ([*FOUR, "--seed", -1], "seed=-1 must not be negative"),
    ([*FOUR, "--moe-router-topk", 5], "moe_router_topk=5"),
    ([*FOUR, "--router-init", "data"], "needs statistics"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_found_before_any_work(
    hf: Path, run: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        upit(hf, [run], tmp_path / "moe", *options)
    assert not list(tmp_path.iterdir())


def test_other_architectures_and_missing_places_are_refused(
    hf: Path, run: Path, tmp_path: Path
) -> None:
    wide = save_llama(tmp_path / "wide", intermediate_size=192)
    four = FOUR[2:]
    with pytest.raises(UserError, match="ffn_hidden_size is 96 and 192"):
        upit(hf, [f"{run}@10", wide], tmp_path / "moe", *four)
    with pytest.raises(UserError, match="are different models: ffn_hidden_size"):
        upit(wide, [f"{run}@10", f"{run}@20"], tmp_path / "moe", *four)
    for missing in (tmp_path / "nowhere", f"{tmp_path}/nowhere@10"):
        with pytest.raises(UserError, match="source .*nowhere does not exist"):
            upit(hf, [hf, missing], tmp_path / "moe", *four)
    with pytest.raises(UserError, match="is not empty"):
        upit(hf, [f"{run}@10", f"{run}@20"], wide, *four)
