"""The plan's global batches as micro-batches of one data-parallel rank, read in the background.

The samples come out the same for every data-parallel size: micro-batch m of rank r of R holds the
slots [(m*R + r) * micro_batch_size, + micro_batch_size) of the global batch, so the set of
micro-batches does not change with R.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ext.data.blend import Batch, BlendPlan
from megatron_ext.data.conversation_stream import (
    ConversationRow,
    ConversationStream,
    collate_conversations,
)
from megatron_ext.data.stream import TokenStream, sample_index
from megatron_ext.errors import UserError

MicroBatch = dict[str, torch.Tensor]
"""tokens, labels, position_ids int64 [b, S]; loss_mask float32 [b, S]; domain int64 [b]; on CPU.

position_ids and loss_mask may be shared between micro-batches: copy one before writing to it.
Conversations bring more (`collate_conversations`)."""

Stream = TokenStream | ConversationStream


class _Ahead(NamedTuple):
    batch: Batch
    content: Future[list[MicroBatch]]


class BatchLoader:
    """The micro-batches of this data-parallel rank, one global batch at a time.

    Weight changes are made with `plan.schedule` and the loader's place is the plan's: it is
    advanced when a batch is handed out, never by reading ahead, so a checkpoint holds exactly what
    was consumed.

    Args:
        plan: shared with whoever changes the weights.
        streams: one for each domain of the plan, in its order; None for a domain without samples,
            and for all when read_tokens is false.
        micro_batch_size: samples in a micro-batch.
        data_parallel_rank: this rank in its data-parallel group.
        data_parallel_size: ranks in that group.
        seq_length: S.
        prefetch: global batches to read ahead; no more than `plan.lag` are, because weights may
            change after that.
        read_tokens: false on pipeline stages that only need to know the domains.
        eod_id: the end-of-document token. What follows it is another document, so that prediction
            is not scored.
    """

    def __init__(
        self,
        plan: BlendPlan,
        streams: Sequence[Stream | None],
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seq_length: int,
        prefetch: int = 2,
        read_tokens: bool = True,
        eod_id: int | None = None,
    ) -> None:
        _check_grid(micro_batch_size, data_parallel_rank, data_parallel_size)
        self.plan = plan
        self._streams = list(streams)
        self._micro_batch_size = micro_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._seq_length, self._read_tokens, self._eod_id = seq_length, read_tokens, eod_id
        self._keys = np.zeros(len(plan.names), np.uint64)
        if read_tokens:
            self._check_streams()
        self._ahead: deque[_Ahead] = deque()
        self._depth = min(prefetch, plan.lag)
        self._reader = ThreadPoolExecutor(1, "batch-loader")

    def next(self, batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the next global batch, in order.

        Args:
            batch_size: of the global batch; a change (ramp-up) discards what was read ahead.

        Raises:
            UserError: batch_size is no multiple of micro_batch_size times data_parallel_size, or
                the data is used up.
        """
        self._num_micro_batches(batch_size)
        batch = self.plan.next_batch(batch_size)
        content = self._take(batch)
        self._read_ahead(batch_size)
        return content.result() if content else self._read(batch)

    def state_dict(self) -> dict[str, object]:
        """The plan's state after the batches handed out, as JSON-able values."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on where `state_dict` was taken, on any data-parallel size."""
        self.plan.load_state_dict(state)

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.clear()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, batch: Batch) -> Future[list[MicroBatch]] | None:
        """What was read ahead for this very batch, if anything.

        The comparison makes it right whatever happened to the plan meanwhile: another batch size, a
        restored state.
        """
        if self._ahead:
            ahead = self._ahead.popleft()
            if (
                ahead.batch.step == batch.step
                and np.array_equal(ahead.batch.domain, batch.domain)
                and np.array_equal(ahead.batch.draw, batch.draw)
            ):
                return ahead.content
            for stale in (ahead, *self._ahead):
                stale.content.cancel()
            self._ahead.clear()
        return None

    def _read_ahead(self, batch_size: int) -> None:
        plan = self.plan.fork()
        for place in range(self._depth):
            try:
                batch = plan.next_batch(batch_size)
            except UserError:
                return  # raised when that batch is asked for
            if place >= len(self._ahead):
                self._ahead.append(_Ahead(batch, self._reader.submit(self._read, batch)))

    def _read(self, batch: Batch) -> list[MicroBatch]:
        """This rank's share of a global batch."""
        shape = (self._num_micro_batches(len(batch.domain)), self._size, self._micro_batch_size)
        domain_MB = batch.domain.reshape(shape)[:, self._rank].astype(np.int64)
        if not self._read_tokens:
            return [{"domain": torch.from_numpy(domain_B)} for domain_B in domain_MB]
        draw_MB = batch.draw.reshape(shape)[:, self._rank]
        sizes, keys = self.plan.num_samples[domain_MB], self._keys[domain_MB]
        index_MB = sample_index(draw_MB, sizes, keys)
        return [
            _collate(
                [
                    self._streams[domain].read(index)  # type: ignore[union-attr]
                    for domain, index in zip(domain_B.tolist(), index_B.tolist(), strict=True)
                ],
                domain_B,
                self._seq_length,
                self._eod_id,
            )
            for domain_B, index_B in zip(domain_MB, index_MB, strict=True)
        ]

    def _num_micro_batches(self, batch_size: int) -> int:
        per_round = self._micro_batch_size * self._size
        if batch_size < 1 or batch_size % per_round:
            raise UserError(
                f"a global batch of {batch_size} samples cannot be split into micro-batches of "
                f"{self._micro_batch_size} on {self._size} data-parallel ranks",
                f"give a multiple of {per_round}",
            )
        return batch_size // per_round

    def _check_streams(self) -> None:
        if len(self._streams) != len(self.plan.names):
            raise UserError(f"{len(self._streams)} streams for {len(self.plan.names)} domains")
        for domain, (name, size) in enumerate(
            zip(self.plan.names, self.plan.num_samples.tolist(), strict=True)
        ):
            stream = self._streams[domain]
            if stream is None:
                if size:
                    raise UserError(f"domain {name} has {size} samples in the plan but no stream")
                continue
            found = (stream.name, stream.num_samples, stream.seq_length)
            if found != (name, size, self._seq_length):
                raise UserError(
                    f"domain {name}: the plan has {size} samples of {self._seq_length} tokens, the "
                    f"stream (name, samples, seq_length) {found}"
                )
            self._keys[domain] = stream.key


def validation_batches(
    stream: Stream,
    num_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    domain: int = 0,
    eod_id: int | None = None,
) -> Iterator[MicroBatch]:
    """The first `num_samples` samples in file order, each read by one data-parallel rank.

    Every rank gets the same number of micro-batches, because a forward pass is collective; rows
    beyond the last sample are zeros with a loss_mask of 0. Divide the sum of the losses by the sum
    of the masks.

    Raises:
        UserError: the stream holds fewer samples.
    """
    _check_grid(micro_batch_size, data_parallel_rank, data_parallel_size)
    if not 1 <= num_samples <= stream.num_samples:
        raise UserError(
            f"validation on {num_samples} samples of domain {stream.name}, which holds "
            f"{stream.num_samples}",
            f"give 1 to {stream.num_samples}",
        )
    domain_B = np.full(micro_batch_size, domain)
    stride = micro_batch_size * data_parallel_size
    for start in range(
        data_parallel_rank * micro_batch_size, _round_up(num_samples, stride), stride
    ):
        present = range(start, min(start + micro_batch_size, num_samples))
        rows = [stream.read(index) for index in present]
        rows += [stream.blank()] * (micro_batch_size - len(rows))
        micro_batch = _collate(rows, domain_B, stream.seq_length, eod_id)
        if len(present) < micro_batch_size:
            micro_batch["loss_mask"] = micro_batch["loss_mask"].clone()
            micro_batch["loss_mask"][len(present) :] = 0
        yield micro_batch


def _collate(
    rows: Sequence[NDArray[np.integer] | ConversationRow],
    domain_B: NDArray[np.int64],
    seq_length: int,
    eod_id: int | None,
) -> MicroBatch:
    """Rows of S + 1 tokens, or of conversations, as one micro-batch."""
    if isinstance(rows[0], ConversationRow):
        return collate_conversations(rows, domain_B, seq_length)  # type: ignore[arg-type]
    shape = (len(rows), seq_length)
    tokens_BS, labels_BS = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for place, row in enumerate(rows):
        tokens_BS[place] = row[:-1]
        labels_BS[place] = row[1:]
    tokens = torch.from_numpy(tokens_BS)
    loss_mask, position_ids = _constants(*shape)
    if eod_id is not None:
        loss_mask = (tokens != eod_id).float()
    return {
        "tokens": tokens,
        "labels": torch.from_numpy(labels_BS),
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "domain": torch.from_numpy(domain_B.copy()),
    }


@lru_cache(maxsize=8)
def _constants(rows: int, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_mask and position_ids of whole samples; writing them took half the loader's time."""
    return torch.ones(rows, seq_length), torch.arange(seq_length).repeat(rows, 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_grid(micro_batch_size: int, rank: int, size: int) -> None:
    if micro_batch_size < 1 or not 0 <= rank < size:
        raise UserError(
            f"micro_batch_size {micro_batch_size} on data-parallel rank {rank} of {size}",
            "give at least 1 sample, and a rank below the number of ranks",
        )
