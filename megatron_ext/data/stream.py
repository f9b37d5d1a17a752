"""One domain as a flat stream of tokens over Megatron's .bin/.idx files, unchanged.

Sample i of an epoch is the contiguous slice [i*S, (i+1)*S] of the stream: S inputs and, one further
on, S labels, across document boundaries (documents are shuffled when the binary is written). The
order of the samples within an epoch is a keyed permutation, so nothing is built when a domain is
opened and any sample of any epoch is reached directly.
"""

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ext.data.permutation import mix_key, permute
from megatron_ext.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_INDEX_BYTES_PER_SEQUENCE = 4 + 8  # int32 length and int64 byte offset
_INDEX_BYTES_PER_DOCUMENT = 8


def stream_key(seed: int, name: str) -> int:
    """The 64-bit key of a domain's sample order; equal in every process and on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int(mix_key(seed, int.from_bytes(digest, "little"))[0])


def sample_index(draw: Any, num_samples: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Which sample the k-th draw of a domain is: epoch k // N, then the permuted k % N.

    Args:
        draw: draw numbers from 0; arrays broadcast with the others.
        num_samples: N, samples in an epoch of the domain.
        key: `stream_key` of the domain.
    """
    draw, num_samples = np.asarray(draw, np.int64), np.asarray(num_samples, np.int64)
    epoch, within = np.divmod(draw, num_samples)
    return permute(within, num_samples, (key, epoch))


class TokenStream:
    """Samples of `seq_length` tokens from the files `prefix`.bin and `prefix`.idx.

    Opening maps both files and reads the header and the last entry of the index; it costs the same
    for any number of tokens or documents.

    Args:
        prefix: path of the pair of files without the extension.
        seq_length: S; a sample is S + 1 tokens, of which the last is the next sample's first.
        seed: with `name`, keys the order of the samples.
        name: the domain's name in the blend.

    Raises:
        UserError: a file is missing, is not of this format, is cut short, or holds too few tokens
            for one sample.
    """

    def __init__(self, prefix: str | Path, seq_length: int, seed: int, name: str) -> None:
        self.prefix, self.seq_length, self.name = str(prefix), seq_length, name
        if seq_length < 1:
            raise UserError(f"domain {name}: seq_length is {seq_length}", "give at least 1")
        if seed < 0:
            raise UserError(f"domain {name}: seed is {seed}", "give a seed of 0 or more")
        self.key = stream_key(seed, name)
        # Kept: it unmaps the files when it goes.
        self._dataset, self.num_tokens = open_indexed(self.prefix, name)
        self._read = self._dataset.bin_reader.read
        self.dtype = np.dtype(self._dataset.index.dtype)
        self.num_samples = max(self.num_tokens - 1, 0) // seq_length
        if self.num_samples == 0:
            raise UserError(
                f"domain {name}: {self.prefix}.bin holds {self.num_tokens} tokens, fewer than the "
                f"{seq_length + 1} of one sample",
                "add text to the domain, leave it out of the blend, or lower seq_length",
            )

    def read(self, index: int) -> NDArray[Any]:
        """The `index`-th slice of the stream, in file order.

        Returns:
            [S + 1], in the file's integer type: a read-only view of the mapped file.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of the {self.num_samples} of domain {self.name}")
        offset = index * self.seq_length * self.dtype.itemsize
        return self._read(dtype=self.dtype, count=self.seq_length + 1, offset=offset)

    def sample(self, draw: int) -> NDArray[np.int64]:
        """The `draw`-th sample of training, in the shuffled order of its epoch. [S + 1]."""
        return self.read(int(sample_index(draw, self.num_samples, self.key))).astype(np.int64)

    def blank(self) -> NDArray[Any]:
        """A sample of zeros, to fill up a batch. [S + 1]."""
        return np.zeros(self.seq_length + 1, self.dtype)

    def sequential(self, index: int) -> NDArray[np.int64]:
        """The `index`-th sample in file order, for validation. [S + 1]."""
        return self.read(index).astype(np.int64)


def open_indexed(prefix: str, name: str) -> tuple[Any, int]:
    """megatron-core's `IndexedDataset` of a domain's pair of files, and its tokens.

    Raises:
        UserError: a file is missing, is not of this format, or is cut short.
    """
    _check_files(prefix, name)

    # Seconds of imports, which tools that only look at a plan must not pay.
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    index, dtype = dataset.index, np.dtype(dataset.index.dtype)
    if dtype.kind not in "iu":
        raise UserError(
            f"domain {name}: {prefix}.bin holds {dtype}, not token ids",
            "write it again with the preprocessing tool",
        )
    # Sequences lie one after the other, so the last entry gives the length of the stream.
    num_tokens = int(index.sequence_pointers[-1]) // dtype.itemsize
    num_tokens += int(index.sequence_lengths[-1])
    present = os.path.getsize(prefix + ".bin") // dtype.itemsize
    if present < num_tokens:
        raise UserError(
            f"domain {name}: {prefix}.bin holds {present} tokens, fewer than the "
            f"{num_tokens} of its index",
            "the file was cut short or belongs to another .idx: copy or write the pair again",
        )
    return dataset, num_tokens


def _check_files(prefix: str, name: str) -> None:
    """Refuse what megatron-core would answer with an assertion or a stack of struct errors."""
    for path in (prefix + ".idx", prefix + ".bin"):
        if not os.path.isfile(path):
            raise UserError(
                f"domain {name}: there is no file {path}",
                "a domain is given as the common path of its .bin and .idx, without the extension",
            )
    again = "write it again with the preprocessing tool"
    with open(prefix + ".idx", "rb") as stream:
        header = stream.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC or len(header) < _HEADER.size:
        raise UserError(f"domain {name}: {prefix}.idx is not a Megatron index", again)
    _, version, dtype_code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or not 1 <= dtype_code <= 8:
        raise UserError(
            f"domain {name}: {prefix}.idx is of version {version}, type {dtype_code}: not known",
            again,
        )
    needed = (
        _HEADER.size + sequences * _INDEX_BYTES_PER_SEQUENCE + documents * _INDEX_BYTES_PER_DOCUMENT
    )
    if os.path.getsize(prefix + ".idx") < needed:
        raise UserError(f"domain {name}: {prefix}.idx is cut short", again)
    if sequences == 0 or os.path.getsize(prefix + ".bin") == 0:
        raise UserError(f"domain {name}: {prefix}.bin holds no tokens", "leave the domain out")
