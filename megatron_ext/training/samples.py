"""The samples that statistics are collected from, and their grouping by what they say."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.data.conversation_stream import ConversationRow, collate_conversations
from megatron_ext.data.loader import Stream
from megatron_ext.errors import UserError

MicroBatch = dict[str, Tensor]


class SamplePool:
    """The first samples of every domain (documents are shuffled when they are written), numbered
    through from 0 to P.

    Which samples there are, and which of their tokens are picked, depends on no grid.

    Args:
        streams: domains by name, all of text or all of conversations.
        num_samples: of each domain; all of a domain that has fewer.
        seq_length: S.
        num_picked: tokens out of all P * S that are picked at random.
        seed: of the pick.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        num_samples: int,
        seq_length: int,
        num_picked: int,
        seed: int,
    ) -> None:
        self.seq_length = seq_length
        self._streams = list(streams.values())
        counts = [min(num_samples, stream.num_samples) for stream in self._streams]
        self._starts = np.cumsum([0, *counts])
        self.size = int(self._starts[-1])
        """P."""
        self.domains = np.repeat(np.arange(len(counts)), counts)
        """Domain of each sample [P]."""
        tokens = self.size * seq_length
        random = np.random.default_rng(seed)
        self.picked = np.sort(random.choice(tokens, min(num_picked, tokens), replace=False))
        """Numbers sample * S + position of the picked tokens, rising."""

    def read(self, sample: int) -> NDArray[Any] | ConversationRow:
        """Tokens [S + 1] of a sample, or its conversations."""
        domain = self.domains[sample]
        return self._streams[domain].read(int(sample - self._starts[domain]))

    def tokens(self, sample: int) -> list[int]:
        """All tokens of a sample."""
        row = self.read(sample)
        parts = row.tokens if isinstance(row, ConversationRow) else [row[:-1]]
        return [int(token) for part in parts for token in part]

    def picked_rows(self, start: int, stop: int) -> tuple[int, int]:
        """The picked tokens of samples start..stop, as a range of `picked`."""
        first, last = np.searchsorted(
            self.picked, [start * self.seq_length, stop * self.seq_length]
        )
        return int(first), int(last)

    def micro_batches(
        self,
        start: int,
        stop: int,
        groups: NDArray[np.int64],
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
    ) -> list[MicroBatch]:
        """Samples start..stop as micro-batches of one data-parallel rank, as many on every rank.

        Args:
            groups: group of each sample of the pool [P].

        Returns:
            As `data.loader.MicroBatch`, with `sample` [b] (counted from start; -1: padding),
            `group` [b] and `picked` [3, p]: sequence, position and row (counted from that of
            start) of each picked token.
        """
        stride = micro_batch_size * data_size
        first_row = self.picked_rows(start, stop)[0]
        batches = []
        for round_start in range(start, stop, stride):
            begin = round_start + data_rank * micro_batch_size
            present = range(begin, min(begin + micro_batch_size, stop))
            sample, group = np.full((2, micro_batch_size), -1)
            sample[: len(present)] = np.array(present, np.int64) - start
            group[: len(present)] = groups[present.start : present.stop]
            low, high = self.picked_rows(begin, max(begin, present.stop))
            sequence, position = np.divmod(
                self.picked[low:high] - begin * self.seq_length, self.seq_length
            )
            picked = np.stack((sequence, position, np.arange(low, high) - first_row))
            places = {"sample": sample, "group": group, "picked": picked}
            batch = self._collate(present, micro_batch_size)
            batches.append(batch | {name: torch.from_numpy(a) for name, a in places.items()})
        return batches

    def _collate(self, present: range, micro_batch_size: int) -> MicroBatch:
        """Samples as one micro-batch, filled up with padding."""
        rows = [self.read(number) for number in present]
        rows += [self._streams[0].blank()] * (micro_batch_size - len(rows))
        if isinstance(rows[0], ConversationRow):
            none = np.zeros(micro_batch_size, np.int64)
            return collate_conversations(rows, none, self.seq_length)  # type: ignore[arg-type]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # type: ignore[arg-type]
        mask = torch.zeros(micro_batch_size, self.seq_length)
        mask[: len(present)] = 1
        positions = torch.arange(self.seq_length).repeat(micro_batch_size, 1)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": positions,
            "loss_mask": mask,
        }


def check_sentence_model(path: Path | None) -> Path:
    """The directory of a sentence-transformers model.

    Raises:
        UserError: none is given, it does not exist, or the library is not installed.
    """
    if path is None:
        raise UserError(
            "groups=sentence needs a sentence-transformers model",
            "name its directory with --sentence-model, or use --groups hidden, which needs none",
        )
    if not path.is_dir():
        raise UserError(f"sentence_model {path} is not a directory", "download the model first")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            "groups=sentence needs the package sentence-transformers",
            "pip install sentence-transformers, or use --groups hidden",
        )
    return path


def sentence_embeddings(pool: SamplePool, model: Path, tokenizer: Path) -> Tensor:
    """Embeddings [P, width] of the samples' texts (LLaMA-MoE groups its data by them).

    Args:
        model: directory of a sentence-transformers model.
        tokenizer: directory of the dense model's tokenizer, which turns tokens back into text.

    Raises:
        UserError: the tokenizer or the model cannot be loaded.
    """
    from transformers import AutoTokenizer

    encoders: Any = importlib.import_module("sentence_transformers")

    try:
        decoder = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        encoder = encoders.SentenceTransformer(str(model), local_files_only=True)
    except Exception as error:  # each library raises its own
        raise UserError(f"cannot load {tokenizer} or {model}: {error}") from error
    samples = (pool.tokens(sample) for sample in range(pool.size))
    texts = [decoder.decode(tokens, skip_special_tokens=True) for tokens in samples]
    embeddings: Tensor = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return embeddings.float().cpu()
