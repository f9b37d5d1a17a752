"""`convert_llama.py partition` with every method, from the command line to the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.experts import fingerprint, recorded_neurons
from megatron_ext.checkpoint.hf import open_weights
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC2,
    ROUTER,
    SHARED_FC1,
    SHARED_FC2,
    layer_key,
)
from megatron_ext.construction import statistics
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import convert, save_llama


def save_statistics(folder: Path, model: Path, groups: int, without: str = "") -> Path:
    """What tools/collect_statistics.py would leave behind, with random numbers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer in range(3):
        fields = {
            "tokens": torch.full((groups,), 50),
            "input_mean": torch.randn(groups, 48, generator=generator).double(),
            "importance": torch.rand(groups, 96, generator=generator).double(),
            "gradient": torch.rand(groups, 96, generator=generator).double(),
            "inputs": torch.randn(64, 48, generator=generator),
            "input_groups": torch.zeros(64, dtype=torch.long),
            "centroids": torch.randn(groups, 48, generator=generator),
        }
        fields.pop(without, None)
        statistics.write_layer(folder, layer, statistics.LayerStatistics(**fields))
    names = [f"group{group}" for group in range(groups)]
    statistics.write_meta(folder, fingerprint(open_weights(model)), names, 3)
    return folder


def partition(source: Path, output: Path, method: str, *options: Any) -> CheckpointWeights:
    convert("partition", "--source", source, "--output", output, "--method", method, *options)
    return CheckpointWeights(output)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("independent_clustering", ["--num-experts", 4, "--cluster-by", "down"]),
        ("co_activation", ["--num-experts", 4]),
        ("gradient", ["--num-experts", 4, "--importance", "feature_grad"]),
        ("sharing_inter", ["--num-experts", 3, "--num-residual", 1]),
        ("gradient_split_plus", ["--num-experts", 2, "--num-residual", 2]),
    ],
)
def test_complete_partitions_are_the_dense_model(
    tmp_path: Path, method: str, options: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if method == "co_activation":
        pytest.importorskip("pymetis")
    hf = save_llama(tmp_path / "hf")
    if method != "independent_clustering":
        given = save_statistics(tmp_path / "statistics", hf, options[1])
        options = [*options, "--statistics", given]
    moe = partition(hf, tmp_path / "moe", method, *options)
    out = capsys.readouterr().out
    assert "equal bit by bit" in out and "all experts together against the dense model" in out
    construction = layout.read_construction(tmp_path / "moe")
    assert construction is not None
    assert construction["method"] == method and construction["complete"] is True
    assert construction["options"]["expert_width"] == 24 == moe.model.expert_width
    maps = recorded_neurons(construction)
    assert sorted(maps) == [0, 1, 2] and all(map_.is_complete(96) for map_ in maps.values())
    down = open_weights(hf).tensor(layer_key(1, "mlp.linear_fc2.weight"))
    stored = moe.tensor(layer_key(1, EXPERTS_FC2))
    assert torch.equal(stored[1], down[:, maps[1].experts[1]])
    residual = moe.model.moe_shared_expert_intermediate_size or 0
    assert residual == len(maps[1].residual)
    if residual:
        assert torch.equal(moe.tensor(layer_key(1, SHARED_FC2)), down[:, maps[1].residual])
        gate, up = open_weights(hf).gate_up(1)
        expected = torch.cat([gate[maps[1].residual], up[maps[1].residual]])
        assert torch.equal(moe.tensor(layer_key(1, SHARED_FC1)), expected)


@pytest.mark.parametrize(
    ("method", "options", "shared"),
    [
        ("sharing_inner", ["--num-experts", 4, "--expert-width", 40], None),
        ("sharing_inter", ["--num-experts", 4, "--expert-width", 20, "--share"], 20),
    ],
)
def test_overlapping_experts(
    tmp_path: Path,
    method: str,
    options: list[Any],
    shared: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf = save_llama(tmp_path / "hf")
    given = save_statistics(tmp_path / "statistics", hf, 4)
    moe = partition(hf, tmp_path / "moe", method, *options, "--statistics", given)
    out = capsys.readouterr().out
    assert "equal bit by bit" in out and "experts overlap" in out
    assert moe.model.moe_ffn_hidden_size == moe.model.expert_width == options[3]
    assert moe.model.moe_shared_expert_intermediate_size == shared


def test_v2_routers_start_from_centroids(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    given = save_statistics(tmp_path / "statistics", hf, 3)
    options = ["--num-experts", 3, "--statistics", given, "--skip-verify"]
    moe = partition(hf, tmp_path / "moe", "gradient_split_plus", *options)
    construction = layout.read_construction(tmp_path / "moe")
    assert construction is not None and construction["router"]["init"] == "centroids"
    rows = moe.tensor(layer_key(2, ROUTER))
    centroids = statistics.Statistics.open(given).layer(2).centroids
    assert centroids is not None
    spread = centroids - centroids.mean(dim=0)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], spread[None], dim=2)
    assert cosines.argmax(dim=1).tolist() == [0, 1, 2]
    plain = partition(hf, tmp_path / "plain", "independent_random", "--num-experts", 4)
    assert plain.tensor(layer_key(2, ROUTER)).std().item() == pytest.approx(0.02, rel=0.3)


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    other = save_llama(tmp_path / "other", seed=1)
    three = save_statistics(tmp_path / "three", hf, 3)
    bare = save_statistics(tmp_path / "bare", hf, 4, without="importance")
    foreign = save_statistics(tmp_path / "foreign", other, 4)
    four = ["--num-experts", 4]
    before = sorted(path.name for path in tmp_path.iterdir())
    for method, options, message in (
        ("gradient", four, "needs statistics of the dense model"),
        ("gradient", [*four, "--statistics", three], "3 groups of data, num_experts=4"),
        ("gradient", [*four, "--statistics", foreign], "are of another model"),
        ("gradient", [*four, "--statistics", bare], "hold no importance of layer 0"),
        ("gradient", [*four, "--statistics", hf], "holds no statistics"),
        ("contiguous", [*four, "--statistics", bare], "looks at no statistics"),
        ("contiguous", [*four, "--metric", "l2"], "contiguous has no option metric"),
        ("contiguous", [*four, "--router-init", "data"], "router_init=data needs statistics"),
        ("sharing_inter", [*four, "--statistics", bare], "num_experts=4 . num_residual=1"),
    ):
        with pytest.raises(UserError, match=message):
            partition(hf, tmp_path / "moe", method, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_statistics_serve_the_routers_of_any_method(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    given = save_statistics(tmp_path / "statistics", hf, 4)
    options = ["--num-experts", 4, "--router-init", "data", "--statistics", given]
    moe = partition(hf, tmp_path / "moe", "independent_random", *options, "--skip-verify")
    plain = partition(hf, tmp_path / "plain", "independent_random", *options[:2], "--skip-verify")
    key = layer_key(0, ROUTER)
    assert not torch.equal(moe.tensor(key), plain.tensor(key))
    key = layer_key(0, EXPERTS_FC2)
    assert torch.equal(moe.tensor(key), plain.tensor(key))
