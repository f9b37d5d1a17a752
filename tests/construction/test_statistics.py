"""The container: what is written is read back, and what is not whole is refused."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.construction.statistics import (
    LayerStatistics,
    Statistics,
    group_means,
    layer_file,
    write_layer,
    write_meta,
)
from megatron_ext.errors import UserError


def make(path: Path) -> list[LayerStatistics]:
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number in range(2):
        layer = LayerStatistics(
            tokens=torch.tensor([3, 0, 5]),
            input_mean=torch.randn(3, 4, generator=generator, dtype=torch.float64),
            importance=torch.rand(3, 6, generator=generator, dtype=torch.float64),
            inputs=torch.randn(7, 4, generator=generator) if number else None,
        )
        write_layer(path, number, layer)
        layers.append(layer)
    write_meta(path, "sha256:abc", ["a", "b", "c"], 2, tokens=8)
    return layers


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    layers = make(tmp_path / "stats")
    found = Statistics.open(tmp_path / "stats")
    assert (found.fingerprint, found.groups, found.num_layers) == ("sha256:abc", ["a", "b", "c"], 2)
    assert found.meta["tokens"] == 8
    for number, expected in enumerate(layers):
        layer = found.layer(number)
        for name, tensor in vars(expected).items():
            ours = getattr(layer, name)
            assert (ours is None) == (tensor is None), name
            assert tensor is None or (torch.equal(ours, tensor) and ours.dtype == tensor.dtype)


def test_another_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "stats")
    found = Statistics.open(tmp_path / "stats")
    found.check("sha256:abc")
    with pytest.raises(UserError, match="another model"):
        found.check("sha256:abd")


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no statistics"):
        Statistics.open(tmp_path)
    (tmp_path / "partial").mkdir()
    with pytest.raises(UserError, match="not finished"):
        Statistics.open(tmp_path)
    make(tmp_path / "stats")
    file = layer_file(tmp_path / "stats", 1)
    file.write_bytes(file.read_bytes()[:-9])
    found = Statistics.open(tmp_path / "stats")
    found.layer(0)
    with pytest.raises(UserError, match="layer_0001.safetensors is missing or damaged"):
        found.layer(1)
    with pytest.raises(UserError, match="layer_0002.safetensors is missing or damaged"):
        found.layer(2)
    meta = tmp_path / "stats" / "statistics.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format_version": 9}))
    with pytest.raises(UserError, match="format 9"):
        Statistics.open(tmp_path / "stats")
    meta.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Statistics.open(tmp_path / "stats")


def test_the_mean_of_an_empty_group_is_zero() -> None:
    sums = torch.tensor([[4.0, 6.0], [0.0, 0.0]], dtype=torch.float64)
    assert group_means(sums, torch.tensor([2, 0])).tolist() == [[2.0, 3.0], [0.0, 0.0]]
