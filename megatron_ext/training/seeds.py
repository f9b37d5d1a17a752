"""UpIT's seed samples: a random part of the training data, read once, and packed in rows.

A sample is a conversation, or S tokens of text. N samples, b rows of a micro-batch of S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.data.conversation_stream import (
    ConversationRow,
    Packing,
    collate_conversations,
)
from megatron_ext.data.loader import Stream
from megatron_ext.data.packing import pack
from megatron_ext.errors import UserError

MicroBatch = dict[str, Tensor]
Ints = NDArray[np.int64]


class SeedSamples:
    """Samples drawn without replacement from all domains alike, the same on every rank.

    Args:
        streams: domains by name, all of text or all of single conversations (packing `padded`).
        fraction: drawn part of all their samples.
        seq_length: S.
        packing: rows of as many conversations as fit, or of one.
        seed: of the draw.

    Raises:
        UserError: nothing is drawn.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        fraction: float,
        seq_length: int,
        packing: Packing,
        seed: int,
    ) -> None:
        self.seq_length, self.packing = seq_length, packing
        self.names = list(streams)
        self._streams = list(streams.values())
        sizes = [stream.num_samples for stream in self._streams]
        starts = np.cumsum([0, *sizes])
        self.available = int(starts[-1])
        """Samples that were drawn from."""
        self.size = round(fraction * self.available)
        """N."""
        if not self.size:
            raise UserError(
                f"seed_fraction={fraction} of {self.available} samples is none", "raise it"
            )
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 2))))
        drawn = np.sort(random.choice(self.available, self.size, replace=False))
        self.domains: Ints = np.searchsorted(starts, drawn, side="right") - 1
        """Domain of each sample [N]."""
        self._contents = [
            self._streams[domain].read(number - int(starts[domain]))
            for domain, number in zip(self.domains.tolist(), drawn.tolist(), strict=True)
        ]
        self.lengths: Ints = np.array([self._length(content) for content in self._contents])
        """Positions of each sample [N]."""
        self.trained: Ints = np.array([self._count(content) for content in self._contents])
        """Trained tokens of each sample [N]."""

    def _length(self, content: NDArray[np.integer] | ConversationRow) -> int:
        if isinstance(content, ConversationRow):
            return len(content.tokens[0])
        return self.seq_length

    def _count(self, content: NDArray[np.integer] | ConversationRow) -> int:
        if isinstance(content, ConversationRow):
            return int(content.trained[0][1:].sum())
        return self.seq_length

    def largest_token(self) -> int:
        """For a check that the data is of the model's tokenizer."""
        return max(
            int(content.tokens[0].max() if isinstance(content, ConversationRow) else content.max())
            for content in self._contents
        )

    def rows(self, samples: Ints) -> list[Ints]:
        """Samples as rows of at most S positions, each the numbers of its samples."""
        lengths = self.lengths[samples]
        if self.packing == "packed":
            row_of = pack(lengths, self.seq_length)
        else:
            row_of = np.arange(len(samples))
        order = np.argsort(row_of, kind="stable")
        return np.split(samples[order], np.cumsum(np.bincount(row_of))[:-1])

    def micro_batches(
        self, rows: Sequence[Ints], micro_batch_size: int, data_rank: int, data_size: int
    ) -> list[MicroBatch]:
        """Rows as micro-batches of one data-parallel rank, as many on every rank.

        Returns:
            As `data.loader.MicroBatch`, with `sample` int64 [b, S]: the sample that a position is
            of; N: none.
        """
        batches = []
        stride = micro_batch_size * data_size
        for start in range(0, len(rows), stride):
            first = start + data_rank * micro_batch_size
            present = list(rows[first : first + micro_batch_size])
            present += [np.empty(0, np.int64)] * (micro_batch_size - len(present))
            batch = self._collate(present)
            sample = np.full((micro_batch_size, self.seq_length), self.size)
            for place, row in enumerate(present):
                sample[place, : self.lengths[row].sum()] = np.repeat(row, self.lengths[row])
            batches.append({**batch, "sample": torch.from_numpy(sample)})
        return batches

    def _collate(self, rows: Sequence[Ints]) -> MicroBatch:
        contents = [[self._contents[number] for number in row.tolist()] for row in rows]
        if isinstance(self._contents[0], ConversationRow):
            talks = [
                ConversationRow(
                    [talk.tokens[0] for talk in row],  # type: ignore[union-attr]
                    [talk.trained[0] for talk in row],  # type: ignore[union-attr]
                    self.packing == "packed",
                )
                for row in contents
            ]
            batch = collate_conversations(talks, np.zeros(len(rows), np.int64), self.seq_length)
            del batch["domain"]
            return batch
        texts = [row[0] if row else self._streams[0].blank() for row in contents]
        tokens = torch.from_numpy(np.stack(texts).astype(np.int64))  # type: ignore[arg-type]
        mask = torch.tensor([float(len(row)) for row in rows]).unsqueeze(1)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(self.seq_length).repeat(len(rows), 1),
            "loss_mask": mask.repeat(1, self.seq_length),
        }
