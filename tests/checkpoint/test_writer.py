"""What the writer leaves on the disk, and what it takes over from a call that was cut short."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.serialization import get_crc32_options

from megatron_ext.checkpoint import layout, writer
from megatron_ext.checkpoint.journal import JOURNAL_FILE
from megatron_ext.checkpoint.tensors import check_finite, tensor_shapes
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import RandomWeights, small_model

MODEL = small_model(num_experts=4)
KEYS = list(tensor_shapes(MODEL))


class Interrupted(RandomWeights):
    """The user presses Ctrl-C when the tensor at `place` is asked for."""

    place = 9

    def tensor(self, key: str) -> torch.Tensor:
        if key == KEYS[self.place]:
            raise KeyboardInterrupt
        return super().tensor(key)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    writer.write_weights(tmp_path / "whole" / "iter", RandomWeights(MODEL))
    return files(tmp_path / "whole" / "iter")


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A folder in which 9 tensors are finished."""
    with pytest.raises(KeyboardInterrupt):
        writer.write_weights(tmp_path / "cut" / "iter", Interrupted(MODEL))
    return tmp_path / "cut" / "iter"


def test_the_same_weights_are_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    writer.write_weights(tmp_path / "again", RandomWeights(MODEL))
    assert files(tmp_path / "again") == whole
    assert len(whole) == len(KEYS) + 3  # .metadata, metadata.json, common.pt: no journal
    assert get_crc32_options()  # other users of torch.save keep theirs


def test_what_is_finished_is_not_asked_for_again(cut: Path, whole: dict[str, bytes]) -> None:
    assert not (cut / "metadata.json").exists()
    second = RandomWeights(MODEL)
    writer.write_weights(cut, second)
    assert second.asked == KEYS[9:]
    assert files(cut) == whole


def test_a_file_that_is_not_whole_is_written_again(cut: Path, whole: dict[str, bytes]) -> None:
    file = cut / writer.file_name(2)
    file.write_bytes(file.read_bytes()[:-1])
    (cut / writer.file_name(4)).unlink()
    journal = cut / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-5])  # killed while it wrote the last line
    second = RandomWeights(MODEL)
    writer.write_weights(cut, second)
    assert second.asked == [KEYS[2], KEYS[4], *KEYS[8:]]
    assert files(cut) == whole


@pytest.mark.parametrize("change", ["experts", "dtype"])
def test_files_of_other_weights_are_not_kept(cut: Path, change: str) -> None:
    if change == "experts":
        layout.write_construction(cut.parent, {"neurons": {"0": [[1, 0]]}})
    second = RandomWeights(MODEL)
    writer.write_weights(cut, second, torch.float16 if change == "dtype" else None)
    assert second.asked == KEYS


def test_a_journal_of_zeros_is_no_journal(cut: Path, whole: dict[str, bytes]) -> None:
    (cut / JOURNAL_FILE).write_bytes(b"\0" * 300 + b"\n")
    writer.write_weights(cut, RandomWeights(MODEL))
    assert files(cut) == whole


def test_a_full_disk_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    weights = RandomWeights(MODEL)
    with pytest.raises(UserError, match=r"needs 0\.\d GB, its disk has 0\.0 GB left"):
        writer.write_weights(tmp_path / "w", weights)
    assert weights.asked == []


def test_a_file_that_another_program_cut_is_noticed(tmp_path: Path) -> None:
    class Meddled(RandomWeights):
        def tensor(self, key: str) -> torch.Tensor:
            if key == KEYS[-1]:
                (tmp_path / "w" / writer.file_name(0)).write_bytes(b"short")
            return super().tensor(key)

    with pytest.raises(UserError, match="holds 5 bytes of embedding.word_embeddings.weight"):
        writer.write_weights(tmp_path / "w", Meddled(MODEL))
    assert not (tmp_path / "w" / "metadata.json").exists()


def test_a_part_of_a_larger_tensor_takes_no_more_room(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    class Parts(RandomWeights):
        def tensor(self, key: str) -> torch.Tensor:
            tensor = super().tensor(key)
            return torch.stack([tensor, tensor])[1].requires_grad_()

    writer.write_weights(tmp_path / "w", Parts(MODEL))
    assert files(tmp_path / "w") == whole


def test_numbers_too_large_for_the_stored_type_are_refused(tmp_path: Path) -> None:
    class Large(RandomWeights):
        def tensor(self, key: str) -> torch.Tensor:
            return super().tensor(key) * (1e6 if key == KEYS[3] else 1)

    with pytest.raises(UserError, match=f"{KEYS[3]} holds numbers that are too large for"):
        writer.write_weights(tmp_path / "w", Large(MODEL), torch.float16)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 131072, 299_999])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype, bad: float, place: int) -> None:
    tensor = torch.zeros(300_000, dtype=dtype)
    tensor[place] = bad
    for view in (tensor.view(300, 1000), tensor.view(300, 1000).T):
        with pytest.raises(UserError, match="some.weight holds 1 values"):
            check_finite("some.weight", view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    check_finite("w", torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0], dtype=dtype))


def test_the_index_names_no_place_of_this_machine(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert str(tmp_path).encode() not in whole[".metadata"]
    assert json.loads(whole["metadata.json"])["sharded_backend"] == "torch_dist"
