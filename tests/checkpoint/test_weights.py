"""Writing and reading weights, and megatron-core reading what we wrote."""

from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import layout, verify
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import (
    FC1,
    count_parameters,
    layer_key,
    merge_qkv,
    split_qkv,
    tensor_shapes,
)
from megatron_ext.checkpoint.writer import write_weights
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import RandomWeights, save_checkpoint, small_model

EVERYTHING = small_model(
    num_experts=4,
    moe_gate="mlp",
    moe_dense_first_layers=1,
    moe_shared_expert_intermediate_size=16,
)


def test_qkv_is_grouped_by_key_head() -> None:
    model = small_model()  # 4 query heads, 2 groups, head width 12
    q, k, v = (torch.arange(rows).float()[:, None].expand(-1, 48) for rows in (48, 24, 24))
    merged = merge_qkv(q, 1000 + k, 2000 + v, model)
    rows = merged[::12, 0].tolist()
    assert rows == [0, 12, 1000, 2000, 24, 36, 1012, 2012]
    for part, back in zip((q, 1000 + k, 2000 + v), split_qkv(merged, model), strict=True):
        assert torch.equal(part, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_checkpoint(tmp_path / "moe", EVERYTHING, dtype)
    source, stored = RandomWeights(EVERYTHING, dtype), CheckpointWeights(path)
    assert stored.dtype == dtype and stored.model == EVERYTHING
    for key in tensor_shapes(EVERYTHING):
        assert torch.equal(source.tensor(key), stored.tensor(key)), key
    assert torch.equal(torch.cat(stored.gate_up(0)), stored.tensor(layer_key(0, FC1)))


def test_every_tensor_is_asked_for_once_in_order(tmp_path: Path) -> None:
    weights = RandomWeights(EVERYTHING)
    written = write_weights(tmp_path / "w", weights)
    assert weights.asked == list(tensor_shapes(EVERYTHING))
    assert written == 4 * count_parameters(EVERYTHING)[0]


@pytest.mark.parametrize(
    "model",
    [EVERYTHING, small_model(), small_model(untie_embeddings_and_output_weights=False)],
    ids=["moe", "dense", "tied"],
)
def test_megatron_core_reads_every_parameter(tmp_path: Path, model: object) -> None:
    path = save_checkpoint(tmp_path / "checkpoint", model)  # type: ignore[arg-type]
    ours = verify.fill(verify.build_model(model), RandomWeights(model))  # type: ignore[arg-type]
    loaded = verify.load(verify.build_model(model), layout.iteration_dir(path, 0))  # type: ignore[arg-type]
    expected = dict(ours.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_reading_what_megatron_core_saved(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    model = verify.fill(verify.build_model(EVERYTHING), RandomWeights(EVERYTHING))
    layout.write_model_config(tmp_path, EVERYTHING)
    folder = layout.iteration_dir(tmp_path, 7)
    folder.mkdir()
    dist_checkpointing.save(verify.sharded_weights(model), str(folder))
    layout.write_latest(tmp_path, 7)
    stored, source = CheckpointWeights(tmp_path), RandomWeights(EVERYTHING)
    assert stored.iteration == 7
    for key in tensor_shapes(EVERYTHING):
        assert torch.equal(source.tensor(key), stored.tensor(key)), key


class Broken(RandomWeights):
    def tensor(self, key: str) -> torch.Tensor:
        tensor = super().tensor(key)
        if key == layer_key(1, FC1):
            tensor[3, 5] = float("nan")
        return tensor


class Misshapen(RandomWeights):
    def tensor(self, key: str) -> torch.Tensor:
        tensor = super().tensor(key)
        return tensor[1:] if key == layer_key(1, FC1) else tensor


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Broken, "decoder.layers.1.mlp.linear_fc1.weight holds 1 values that are NaN"),
        (Misshapen, r"decoder.layers.1.mlp.linear_fc1.weight has shape \[191, 48\]"),
    ],
)
def test_bad_tensors_are_refused(tmp_path: Path, kind: type[RandomWeights], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_weights(tmp_path / "w", kind(small_model()))
    assert not (tmp_path / "w" / "metadata.json").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", small_model())
    layout.write_model_config(path, small_model(num_experts=4))
    with pytest.raises(UserError, match="has no tensor decoder.layers.0.mlp.router.weight"):
        CheckpointWeights(path)
    layout.write_model_config(path, small_model(ffn_hidden_size=90))
    with pytest.raises(UserError, match=r"linear_fc1.weight has shape \[192, 48\]"):
        CheckpointWeights(path)
