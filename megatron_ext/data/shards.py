"""Documents as shards of token ids, and shards merged into Megatron's shuffled `.bin/.idx`.

A document has two keys, both free of how the work was cut up: a keyed hash of its text, which
decides whether it is held out (equal texts are on one side, in every domain), and a pseudo-random
number from its place in the input, by which documents are ordered. A shard is sorted by that
number, so the merge takes one range of it after the other, reads a contiguous slice of each shard,
and writes: shuffled, in bounded memory, the same bytes whatever the shards were.
"""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.jsonl import BadLine, Chunk, split_lines
from megatron_ext.data.permutation import mix_key
from megatron_ext.data.readers import TRAINED, Dropped, Reader

SPLITS = ("train", "valid")

_DOCUMENT = np.dtype(
    [("order", "<u8"), ("text_hash", "<u8"), ("text_bytes", "<i8"), ("tokens", "<i4")]
)
_MERGE_BYTES = 1 << 28
_EXAMPLES = 5

# The .idx format of megatron-core's IndexedDataset; dtype codes are those of its DType.
_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_IDX_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


# --- A chunk of lines to a shard --------------------------------------------------------------


@dataclass(frozen=True)
class ShardWriter:
    """Tokenizes chunks into `directory`: NAME.bin (ids) and NAME.docs (a record per document)."""

    directory: Path
    reader: Reader
    seed: int
    skip_errors: bool

    def write(self, name: str, file_number: int, chunk: Chunk) -> dict[str, Any]:
        """Write one shard; files appear under their names only when they are complete.

        Returns:
            `skipped` (malformed lines per reason), `examples` (line number and complaint of the
            first few), `dropped` (documents left out) and, unless lines were malformed and are not
            to be skipped, `cut` (documents cut), `bin_bytes` and `docs_bytes` (sizes of the files).
        """
        items, documents, record = self._parse(file_number, chunk)
        if record["skipped"] and not self.skip_errors:
            return record
        tokens, lengths, record["cut"] = self.reader.encode(items)
        documents["tokens"] = lengths
        order = np.argsort(documents["order"])
        for suffix, data in (
            ("bin", _take(tokens, lengths, order)),
            ("docs", documents[order]),
        ):
            temporary = self.directory / f"{name}.{suffix}.{os.getpid()}"
            data.tofile(temporary)
            os.replace(temporary, self.directory / f"{name}.{suffix}")
            record[f"{suffix}_bytes"] = data.nbytes
        return record

    def _parse(
        self, file_number: int, chunk: Chunk
    ) -> tuple[list[Any], NDArray[Any], dict[str, Any]]:
        key = str(self.seed).encode()
        items: list[Any] = []
        places: list[int] = []
        hashes: list[int] = []
        sizes: list[int] = []
        skipped: Counter[str] = Counter()
        examples: list[tuple[int, str]] = []
        dropped = 0
        for number, line in enumerate(split_lines(chunk.data), chunk.first_line):
            try:
                item, raw = self.reader.parse(line)
            except BadLine as bad:
                skipped[bad.reason] += 1
                if len(examples) < _EXAMPLES:
                    examples.append((number, str(bad)))
                continue
            except Dropped:
                dropped += 1
                continue
            items.append(item)
            places.append((file_number << 40) + number)
            digest = hashlib.blake2b(raw, digest_size=8, key=key).digest()
            hashes.append(int.from_bytes(digest, "little"))
            sizes.append(len(raw))
        documents = np.empty(len(items), _DOCUMENT)
        documents["order"] = mix_key(self.seed, np.array(places, np.uint64))
        documents["text_hash"] = np.array(hashes, np.uint64)
        documents["text_bytes"] = sizes
        record = {"skipped": dict(skipped), "examples": examples, "dropped": dropped}
        return items, documents, record


def _take(tokens: NDArray[Any], lengths: NDArray[Any], chosen: NDArray[Any]) -> NDArray[Any]:
    """The chosen documents, one after the other, of `tokens` that has documents of `lengths`."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths)[chosen].tolist()
    pieces = [tokens[a:b] for a, b in zip(starts, ends[chosen].tolist(), strict=True)]
    return np.concatenate(pieces) if pieces else tokens[:0]


# --- Shards to .bin and .idx ------------------------------------------------------------------


class IndexedWriter:
    """Writes `prefix`.bin and `prefix`.idx as IndexedDatasetBuilder does, a document a sequence.

    Ids with the bit `TRAINED` also give `prefix`.mask: a byte per token of .bin, 1 where it is
    trained, found by the same index. Counts what it wrote: `documents`, `tokens`, `trained`,
    `text_bytes` (of their UTF-8). Without documents there are no files, because an empty one cannot
    be mapped.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], masked: bool = False) -> None:
        self._prefix, self._dtype, self._masked = prefix, dtype, masked
        self._files: list[BinaryIO] = []
        self._lengths: list[NDArray[np.int32]] = []
        self.documents = self.tokens = self.trained = self.text_bytes = 0

    def add(self, tokens: NDArray[Any], documents: NDArray[Any]) -> None:
        """Append documents (`_DOCUMENT` records) whose ids follow each other in `tokens`."""
        if not self._files:
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            suffixes = ("bin", "mask") if self._masked else ("bin",)
            self._files = [open(f"{self._prefix}.{suffix}", "wb") for suffix in suffixes]
        if self._masked:
            trained = (tokens >= TRAINED).astype(np.uint8)
            trained.tofile(self._files[1])
            self.trained += int(trained.sum())
            tokens = (tokens & ~TRAINED).astype(self._dtype)
        tokens.tofile(self._files[0])
        self._lengths.append(documents["tokens"].astype(np.int32))
        self.documents += len(documents)
        self.tokens += len(tokens)
        self.text_bytes += int(documents["text_bytes"].sum())

    def close(self) -> None:
        if not self._files:
            return
        for file in self._files:
            file.close()
        lengths = np.concatenate(self._lengths)
        count = len(lengths)
        with open(f"{self._prefix}.idx", "wb") as idx:
            code = _DTYPE_CODES[self._dtype]
            idx.write(_IDX_HEADER.pack(_IDX_MAGIC, 1, code, count, count + 1))
            lengths.tofile(idx)
            ends = np.cumsum(lengths, dtype=np.int64)
            ((ends - lengths) * self._dtype.itemsize).tofile(idx)
            np.arange(count + 1, dtype=np.int64).tofile(idx)


def merge_shards(
    shards: list[Path],
    outputs: dict[str, IndexedWriter],
    dtype: np.dtype[Any],
    hold_out: float | int,
    progress: Callable[[int], Any],
) -> None:
    """Write the documents of one domain, in their order, into its `train` and `valid` outputs.

    Args:
        shards: paths without extension.
        dtype: of their ids.
        hold_out: share of the texts to hold out (float), or number of different texts (int).
        progress: called with the bytes that were written since the last call.
    """
    total = sum(os.path.getsize(f"{shard}.bin") for shard in shards)
    ranges = total // _MERGE_BYTES + 1
    inner = np.array([(i << 64) // ranges for i in range(1, ranges)], np.uint64)
    # Per shard, where each range begins: in documents and in tokens.
    firsts = np.zeros((len(shards), ranges + 1), np.int64)
    offsets = np.zeros_like(firsts)
    wanted = hold_out if isinstance(hold_out, int) else min(1, int(np.ceil(hold_out)))
    smallest = np.empty(0, np.uint64)
    for row, shard in enumerate(shards):
        documents = np.fromfile(f"{shard}.docs", _DOCUMENT)
        firsts[row, 1:-1] = np.searchsorted(documents["order"], inner)
        firsts[row, -1] = len(documents)
        ends = np.cumsum(documents["tokens"], dtype=np.int64)
        offsets[row] = np.concatenate([[0], ends])[firsts[row]]
        smallest = np.unique(np.concatenate([smallest, documents["text_hash"]]))[:wanted]
    # A share is a threshold too, but never below the smallest hash: no domain without validation.
    threshold = int(smallest[-1]) if len(smallest) else -1
    if isinstance(hold_out, float):
        threshold = max(threshold, int(hold_out * 2**64) - 1)

    for column in range(ranges):
        parts, ids = [np.empty(0, _DOCUMENT)], [np.empty(0, dtype)]
        for row, shard in enumerate(shards):
            first, last = firsts[row, column : column + 2].tolist()
            begin, end = offsets[row, column : column + 2].tolist()
            if first < last:
                at = first * _DOCUMENT.itemsize
                parts.append(np.fromfile(f"{shard}.docs", _DOCUMENT, last - first, offset=at))
                at = begin * dtype.itemsize
                ids.append(np.fromfile(f"{shard}.bin", dtype, end - begin, offset=at))
        documents, tokens = np.concatenate(parts), np.concatenate(ids)
        order = np.argsort(documents["order"], kind="stable")
        held_out = (
            documents["text_hash"][order] <= np.uint64(threshold)
            if threshold >= 0
            else np.zeros(len(order), bool)
        )
        for split, chosen in (("train", order[~held_out]), ("valid", order[held_out])):
            if len(chosen):
                outputs[split].add(_take(tokens, documents["tokens"], chosen), documents[chosen])
        progress(tokens.nbytes)
