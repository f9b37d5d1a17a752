"""One data set of conversations as samples of S tokens: packed, or one to a row.

Read from NAME.bin and NAME.idx (a conversation a sequence) and NAME.mask (a byte per token, 1 where
it is trained), as tools/preprocess_data.py --task sft writes them. Rows are packed once, when the
data set is opened; their order in an epoch is a keyed permutation, as that of a `TokenStream`.

b rows of a micro-batch, S positions.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ext.data.packing import pack
from megatron_ext.data.permutation import mix_key
from megatron_ext.data.stream import open_indexed, sample_index, stream_key
from megatron_ext.errors import UserError

logger = logging.getLogger(__name__)

Packing = Literal["packed", "padded"]


class ConversationRow(NamedTuple):
    """The conversations of one row, in order; views of files that are mapped while the stream
    lives.
    """

    tokens: list[NDArray[Any]]
    trained: list[NDArray[np.uint8]]
    packed: bool


class ConversationStream:
    """Rows of `seq_length` tokens that hold whole conversations of one data set.

    Args:
        prefix: common path of the files, without extension.
        seq_length: S.
        seed: with `name`, keys the order of the rows.
        name: the data set's name in the blend.
        packing: `packed` (data/packing.py) or `padded` (a conversation a row).

    Raises:
        UserError: a file is missing, damaged, or holds conversations longer than a row.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_length: int,
        seed: int,
        name: str,
        packing: Packing = "packed",
    ) -> None:
        self.prefix, self.seq_length, self.name = str(prefix), seq_length, name
        self.packed = packing == "packed"
        self.key = stream_key(seed, name)
        # Kept: it unmaps the files when it goes.
        self._dataset, self.num_tokens = open_indexed(self.prefix, name)
        self._read = self._dataset.bin_reader.read
        self.dtype = np.dtype(self._dataset.index.dtype)
        self._trained = _open_mask(self.prefix, name, self.num_tokens)
        self._lengths = self._dataset.index.sequence_lengths
        self._pointers = self._dataset.index.sequence_pointers
        longest = int(self._lengths.max())
        if longest > seq_length:
            raise UserError(
                f"data set {name} holds a conversation of {longest} tokens, more than "
                f"seq_length={seq_length}",
                f"preprocess it again with --seq-length {seq_length}, or raise seq_length",
            )
        conversations = len(self._lengths)
        if self.packed:
            rows = pack(self._lengths, seq_length)
            # Numbered anew at random: the first ones, which are evaluated, would be the longest.
            order = np.argsort(mix_key(np.arange(rows.max() + 1)), kind="stable")
            rows = np.argsort(order)[rows]
        else:
            rows = np.arange(conversations)
        self._members = np.argsort(rows, kind="stable").astype(np.int32)
        self._starts = np.concatenate(([0], np.cumsum(np.bincount(rows))))
        self.num_samples = len(self._starts) - 1
        self.waste = 1 - self.num_tokens / (self.num_samples * seq_length)
        """Share of the positions that hold no token."""
        logger.info(
            "%s: %d conversations in %d rows of %d tokens, %s; %.1f %% of the rows are empty",
            self.prefix,
            conversations,
            self.num_samples,
            seq_length,
            packing,
            100 * self.waste,
        )

    def read(self, index: int) -> ConversationRow:
        """The `index`-th row."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"row {index} of the {self.num_samples} of data set {self.name}")
        tokens, trained = [], []
        for member in self._members[self._starts[index] : self._starts[index + 1]].tolist():
            offset, length = int(self._pointers[member]), int(self._lengths[member])
            start = offset // self.dtype.itemsize
            tokens.append(self._read(dtype=self.dtype, count=length, offset=offset))
            trained.append(self._trained[start : start + length])
        return ConversationRow(tokens, trained, self.packed)

    def sample(self, draw: int) -> ConversationRow:
        """The `draw`-th row of training, in the shuffled order of its epoch."""
        return self.read(int(sample_index(draw, self.num_samples, self.key)))

    def blank(self) -> ConversationRow:
        """A row of padding only."""
        return ConversationRow([], [], self.packed)


def collate_conversations(
    rows: Sequence[ConversationRow], domain_B: NDArray[np.int64], seq_length: int
) -> dict[str, torch.Tensor]:
    """Rows as one micro-batch.

    Returns:
        tokens, labels, position_ids int64 [b, S] and loss_mask float32 [b, S], where a label is the
        next token of the same conversation and the last token of one has none; padding_mask bool
        [b, S], True where there is no token; domain int64 [b]. If the rows are packed, also
        cu_seqlens int32: where each conversation begins when the rows are laid end to end, padding
        counted as one more conversation of its row, and b * S.
    """
    shape = (len(rows), seq_length)
    tokens_BS, labels_BS = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    position_BS, mask_BS = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    padding_BS = np.ones(shape, bool)
    begins = []
    for place, row in enumerate(rows):
        at = 0
        for tokens, trained in zip(row.tokens, row.trained, strict=True):
            end = at + len(tokens)
            begins.append(place * seq_length + at)
            tokens_BS[place, at:end] = tokens
            labels_BS[place, at : end - 1] = tokens[1:]
            mask_BS[place, at : end - 1] = trained[1:]
            position_BS[place, at:end] = np.arange(end - at)
            padding_BS[place, at:end] = False
            at = end
        if at < seq_length:
            begins.append(place * seq_length + at)
    batch = {
        "tokens": tokens_BS,
        "labels": labels_BS,
        "loss_mask": mask_BS,
        "position_ids": position_BS,
        "padding_mask": padding_BS,
        "domain": domain_B.copy(),
    }
    if rows[0].packed:
        batch["cu_seqlens"] = np.array([*begins, len(rows) * seq_length], np.int32)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _open_mask(prefix: str, name: str, num_tokens: int) -> NDArray[np.uint8]:
    path = f"{prefix}.mask"
    if not os.path.isfile(path):
        raise UserError(
            f"data set {name}: there is no file {path}, so which tokens are trained is not known",
            "write it with tools/preprocess_data.py --task sft, or pretrain on it (task: pretrain)",
        )
    if os.path.getsize(path) != num_tokens:
        raise UserError(
            f"data set {name}: {path} has {os.path.getsize(path)} bytes for {num_tokens} tokens",
            "the file was cut short or belongs to another .bin: copy or write all three again",
        )
    return np.memmap(path, np.uint8, mode="r")
