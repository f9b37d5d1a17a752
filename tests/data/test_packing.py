"""Packing against the textbook algorithm, and rows against the conversations they hold."""

import bisect
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from data.chats import write_conversations

from megatron_ext.data.blend import BlendPlan
from megatron_ext.data.conversation_stream import ConversationStream, collate_conversations
from megatron_ext.data.loader import BatchLoader, validation_batches
from megatron_ext.data.packing import best_fit_decreasing
from megatron_ext.errors import UserError

S, SEED, VOCABULARY = 32, 5, 1000
LENGTHS = [32, 31, 2, 7, 9, 20, 12, 5, 5, 5, 30, 16, 16, 3, 11, 8, 26, 6]


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best fit decreasing as it is written down: how full each row gets."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        bisect.insort(rooms, (rooms.pop(place) if place < len(rooms) else capacity) - length)
    return sorted(capacity - room for room in rooms)


@pytest.mark.parametrize("capacity", [1, 7, 64, 500])
def test_best_fit_decreasing(capacity: int) -> None:
    random = np.random.default_rng(capacity)
    for trial in range(40):
        if trial % 2:
            lengths = random.integers(1, capacity + 1, random.integers(1, 300))
        else:
            lengths = np.minimum(random.geometric(4 / (capacity + 3), 300), capacity)
        rows = best_fit_decreasing(lengths, capacity)
        filled = np.bincount(rows, weights=lengths)
        assert sorted(filled) == one_by_one(lengths.tolist(), capacity)
    for bad in ([0, 1], [1, capacity + 1]):
        with pytest.raises(ValueError):
            best_fit_decreasing(np.array(bad), capacity)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("talk"), "talk", LENGTHS, VOCABULARY)


def conversations(prefix: Path) -> list[tuple[list[int], list[int]]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    mask = np.fromfile(f"{prefix}.mask", np.uint8)
    parts = np.split(mask, np.cumsum(dataset.sequence_lengths)[:-1])
    return [(dataset[i].tolist(), part.tolist()) for i, part in enumerate(parts)]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_an_epoch_holds_every_conversation_once(
    prefix: Path, packing: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stream = ConversationStream(prefix, S, SEED, "talk", packing)  # type: ignore[arg-type]
    least = -(-sum(LENGTHS) // S)
    assert stream.num_samples == (least if packing == "packed" else len(LENGTHS))
    assert stream.waste == pytest.approx(1 - sum(LENGTHS) / (stream.num_samples * S))
    assert f"{100 * stream.waste:.1f} % of the rows are empty" in caplog.text
    expected = sorted(conversations(prefix))
    orders = []
    for epoch in range(2):
        draws = range(epoch * stream.num_samples, (epoch + 1) * stream.num_samples)
        rows = [stream.sample(draw) for draw in draws]
        assert all(sum(map(len, row.tokens)) <= S for row in rows)
        found = [
            (tokens.tolist(), trained.tolist())
            for row in rows
            for tokens, trained in zip(row.tokens, row.trained, strict=True)
        ]
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]
    again = ConversationStream(prefix, S, SEED, "talk", packing)  # type: ignore[arg-type]
    assert [t.tolist() for t in again.sample(3).tokens] == [
        t.tolist() for t in stream.sample(3).tokens
    ]
    with pytest.raises(IndexError):
        stream.read(stream.num_samples)


def test_collate(prefix: Path) -> None:
    stream = ConversationStream(prefix, S, SEED, "talk")
    rows = [stream.read(0), stream.blank(), stream.read(1)]
    batch = collate_conversations(rows, np.array([0, 0, 2]), S)
    assert batch["domain"].tolist() == [0, 0, 2]
    begins, untouched = [], torch.ones(3, S, dtype=torch.bool)
    for row, (tokens, trained, _) in enumerate(rows):
        at = 0
        for ids, mask in zip(tokens, trained, strict=True):
            here = slice(at, at + len(ids))
            begins.append(row * S + at)
            assert batch["tokens"][row, here].tolist() == ids.tolist()
            assert batch["labels"][row, here].tolist()[:-1] == ids[1:].tolist()
            assert batch["loss_mask"][row, here].tolist() == [*mask[1:].tolist(), 0]
            assert batch["position_ids"][row, here].tolist() == list(range(len(ids)))
            untouched[row, here] = False
            at += len(ids)
        if at < S:
            begins.append(row * S + at)
    assert torch.equal(batch["padding_mask"], untouched)
    assert not batch["loss_mask"][untouched].any() and not batch["tokens"][untouched].any()
    assert batch["cu_seqlens"].tolist() == [*begins, 3 * S]
    padded = ConversationStream(prefix, S, SEED, "talk", "padded")
    assert "cu_seqlens" not in collate_conversations([padded.read(0)], np.zeros(1, int), S)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_ranks_share_the_same_global_batches(prefix: Path, tmp_path: Path, packing: str) -> None:
    other = write_conversations(tmp_path, "other", LENGTHS[::-1], VOCABULARY, seed=1)

    def read(rank: int, size: int) -> list[list[int]]:
        streams = [
            ConversationStream(path, S, SEED, name, packing)  # type: ignore[arg-type]
            for path, name in ((prefix, "talk"), (other, "other"))
        ]
        plan = BlendPlan(
            ["talk", "other"], [s.num_samples for s in streams], [0.6, 0.4], SEED, lag=2
        )
        with BatchLoader(plan, streams, 2, rank, size, S) as loader:
            batches = [loader.next(8) for _ in range(4)]
        return [micro["tokens"].flatten().tolist() for batch in batches for micro in batch]

    alone = read(0, 1)
    together = [read(rank, 2) for rank in range(2)]
    assert [micro for pair in zip(*together, strict=True) for micro in pair] == alone


def test_held_out_rows_are_read_once(prefix: Path) -> None:
    stream = ConversationStream(prefix, S, SEED, "talk")
    batches = [
        batch
        for rank in range(2)
        for batch in validation_batches(stream, stream.num_samples, 2, rank, 2)
    ]
    tokens = sum(int((~batch["padding_mask"]).sum()) for batch in batches)
    assert tokens == sum(LENGTHS)
    trained = sum(sum(mask[1:]) for _, mask in conversations(prefix))
    assert sum(float(batch["loss_mask"].sum()) for batch in batches) == trained


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda mask: mask.unlink(), "no file .*talk.mask"),
        (lambda mask: mask.write_bytes(mask.read_bytes()[:-1]), "bytes for"),
    ],
)
def test_a_missing_or_cut_mask_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    prefix = write_conversations(tmp_path, "talk", LENGTHS, VOCABULARY)
    damage(prefix.with_suffix(".mask"))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        ConversationStream(prefix, S, SEED, "talk")


def test_longer_conversations_than_rows_are_refused(prefix: Path) -> None:
    with pytest.raises(UserError, match="a conversation of 32 tokens, more than seq_length=31"):
        ConversationStream(prefix, 31, SEED, "talk")
