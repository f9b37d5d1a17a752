"""Damaged and foreign safetensors are refused when they are opened, before any work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.hf import READ_AHEAD, HfWeights, open_weights
from megatron_ext.checkpoint.sources import SafetensorsSource
from megatron_ext.checkpoint.tensors import tensor_shapes
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import convert, save_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    source = SafetensorsSource(save_llama(tmp_path, dtype=dtype))
    expected = {}
    for file in tmp_path.glob("*.safetensors"):
        expected |= load_file(file)
    assert source.names == expected.keys() and source.dtype == dtype
    for name, tensor in expected.items():
        found = source.tensor(name)
        assert found.dtype == dtype and torch.equal(found, tensor), name
        assert source.shape(name) == tuple(tensor.shape)


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def test_a_shard_that_lacks_its_last_byte_is_refused_before_any_work(tmp_path: Path) -> None:
    shard = last_shard(save_llama(tmp_path / "hf"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is truncated or damaged"):
        convert("partition", "--source", tmp_path / "hf", "--output", tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    shard = last_shard(save_llama(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        open_weights(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = SafetensorsSource(save_llama(tmp_path))
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="became shorter"):
        for name in source.names:
            source.tensor(name)


def test_reading_ahead_changes_nothing_and_holds_only_what_was_asked_for(tmp_path: Path) -> None:
    source = SafetensorsSource(save_llama(tmp_path))
    names = sorted(source.names)
    plain = {name: source.tensor(name) for name in names}
    source.prefetch(names[:3])
    source.prefetch(names[2:4])
    assert source._ahead.keys() == set(names[2:4])
    for name in names:  # some of them ahead, some not, one twice
        assert torch.equal(source.tensor(name), plain[name]), name
    assert torch.equal(source.tensor(names[2]), plain[names[2]])
    assert not source._ahead


def test_who_reads_in_order_gets_the_next_tensors_read_ahead(tmp_path: Path) -> None:
    dense = open_weights(save_llama(tmp_path))
    assert isinstance(dense, HfWeights)
    source = dense.source
    assert isinstance(source, SafetensorsSource)
    keys = list(tensor_shapes(dense.model))

    def ahead(place: int) -> int:
        """Asks for a tensor; how many others are being read then."""
        dense.tensor(keys[place])
        names = source._ahead.keys()
        return next(
            n
            for n in range(len(keys))
            if names == {name for key in keys[place + 1 : place + 1 + n] for name in rules[key]}
        )

    rules = {key: dense._rules[key].names for key in keys}
    # One tensor or two say little; a break of the order lets go of what was read.
    assert [ahead(place) for place in (3, 4, 5, 6, 7, 8, 1, 2)] == [0, 1, 2, 3, 4, 4, 0, 1]
    assert READ_AHEAD == 4


def test_what_goes_wrong_ahead_is_told_when_the_tensor_is_asked_for(tmp_path: Path) -> None:
    source = SafetensorsSource(save_llama(tmp_path))
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"")
    name = min(source.names)
    source.prefetch([name])
    with pytest.raises(UserError, match="became shorter"):
        source.tensor(name)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    shard = last_shard(save_llama(tmp_path))
    tensors = load_file(shard)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, shard)
    with pytest.raises(UserError, match=f"{name} holds numbers of type I8"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 100}, r"gate_proj.weight has shape \[96, 48\], .* it \[100, 48\]"),
        ({"vocab_size": 128}, r"embed_tokens.weight has shape \[101, 48\], .* it \[128, 48\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \[24, 48\], .* it \[48, 48\]"),
    ],
)
def test_a_config_of_another_model_is_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    config = save_llama(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)
