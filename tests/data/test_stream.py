import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.data.stream import TokenStream, stream_key
from megatron_ext.errors import UserError


def write(prefix: Path, documents: list[np.ndarray], dtype: type = np.int32) -> np.ndarray:
    """A domain's pair of files; returns its tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return np.concatenate(documents).astype(np.int64)


def documents(seed: int, count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60_000, rng.integers(1, 50)) for _ in range(count)]


def write_sparse(prefix: Path, sequences: int, length: int) -> None:
    """Files as they would be for equal documents, with holes where nothing is to be read."""
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, sequences, sequences + 1))
        stream.seek(4 * (sequences - 1), os.SEEK_CUR)
        stream.write(struct.pack("<i", length))
        stream.seek(8 * (sequences - 1), os.SEEK_CUR)
        stream.write(struct.pack("<q", (sequences - 1) * length * 4))
        stream.seek(8 * sequences, os.SEEK_CUR)
        stream.write(struct.pack("<q", sequences))
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(sequences * length * 4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_samples_are_slices_across_documents(tmp_path: Path, dtype: type) -> None:
    tokens = write(tmp_path / "a", documents(0), dtype)
    stream = TokenStream(tmp_path / "a", 16, 1, "a")
    assert stream.num_tokens == len(tokens)
    assert stream.num_samples == (len(tokens) - 1) // 16
    for index in range(stream.num_samples):
        sample = stream.sequential(index)
        assert sample.dtype == np.int64
        assert np.array_equal(sample, tokens[index * 16 : index * 16 + 17])
    with pytest.raises(IndexError):
        stream.sequential(stream.num_samples)
    with pytest.raises(IndexError):
        stream.sequential(-1)


def test_an_epoch_reads_every_sample_once_and_each_epoch_in_another_order(tmp_path: Path) -> None:
    write(tmp_path / "a", [np.arange(1001)])  # the first token of a sample tells which it is
    stream = TokenStream(tmp_path / "a", 10, 1, "a")
    count = stream.num_samples
    assert count == 100
    epochs = [[int(stream.sample(e * count + k)[0]) // 10 for k in range(count)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count)) and epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    write(tmp_path / "a", [np.arange(1001)])

    def order(seed: int, name: str) -> list[int]:
        stream = TokenStream(tmp_path / "a", 10, seed, name)
        return [int(stream.sample(k)[0]) for k in range(100)]

    assert order(1, "a") == order(1, "a")
    assert order(1, "a") != order(2, "a") and order(1, "a") != order(1, "b")


def test_key_is_the_same_in_another_process() -> None:
    code = "from megatron_ext.data.stream import stream_key; print(stream_key(5, 'wikipedia'))"
    env = os.environ | {"PYTHONHASHSEED": "77"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout
    assert int(printed) == stream_key(5, "wikipedia") == 4252538525955348289


@pytest.mark.parametrize("sequences", [500, 10**9])
def test_a_domain_of_1e12_tokens_opens_and_reads(tmp_path: Path, sequences: int) -> None:
    length = 10**12 // sequences
    write_sparse(tmp_path / "a", sequences, length)
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(4 * (10**12 - 5))
        file.write(np.arange(1, 6, dtype=np.int32).tobytes())
    stream = TokenStream(tmp_path / "a", 2, 0, "a")
    assert stream.num_tokens == 10**12 and stream.num_samples == (10**12 - 1) // 2
    last = stream.num_samples - 1
    assert stream.sequential(last).tolist() == [2, 3, 4]
    assert stream.sample(10**12).shape == (3,)


class TestRefusals:
    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        write(tmp_path / "a", documents(0))
        return tmp_path / "a"

    def refused(self, prefix: Path, seq_length: int = 16) -> str:
        with pytest.raises(UserError) as caught:
            TokenStream(prefix, seq_length, 0, "web")
        assert "domain web" in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("extension", ["bin", "idx"])
    def test_missing_file(self, prefix: Path, extension: str) -> None:
        os.remove(f"{prefix}.{extension}")
        assert f"a.{extension}" in self.refused(prefix)

    def test_too_few_tokens(self, prefix: Path) -> None:
        assert "fewer than the 4097 of one sample" in self.refused(prefix, 4096)

    def test_no_tokens_at_all(self, tmp_path: Path) -> None:
        IndexedDatasetBuilder(f"{tmp_path}/a.bin").finalize(f"{tmp_path}/a.idx")
        assert "no tokens" in self.refused(tmp_path / "a")

    def test_wrong_magic(self, prefix: Path) -> None:
        Path(f"{prefix}.idx").write_bytes(b"something else that is long enough for a header")
        assert "not a Megatron index" in self.refused(prefix)

    def test_empty_index(self, prefix: Path) -> None:
        Path(f"{prefix}.idx").write_bytes(b"")
        assert "not a Megatron index" in self.refused(prefix)

    def test_wrong_version(self, prefix: Path) -> None:
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        content[9] = 2
        Path(f"{prefix}.idx").write_bytes(content)
        assert "version 2" in self.refused(prefix)

    def test_float_tokens(self, tmp_path: Path) -> None:
        write(tmp_path / "a", documents(0), np.float32)
        assert "not token ids" in self.refused(tmp_path / "a")

    def test_cut_bin(self, prefix: Path) -> None:
        os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 4)
        assert "fewer than" in self.refused(prefix)

    def test_cut_idx(self, prefix: Path) -> None:
        os.truncate(f"{prefix}.idx", os.path.getsize(f"{prefix}.idx") - 1)
        assert "cut short" in self.refused(prefix)

    def test_nonsense_arguments(self, prefix: Path) -> None:
        assert "seq_length" in self.refused(prefix, 0)
        with pytest.raises(UserError, match="seed"):
            TokenStream(prefix, 16, -1, "web")
