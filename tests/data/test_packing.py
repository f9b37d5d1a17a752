"""Packing against brute force, and rows against the conversations they hold."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from data.chats import write_conversations

from megatron_ext.data.blend import BlendPlan
from megatron_ext.data.conversation_stream import ConversationStream, collate_conversations
from megatron_ext.data.loader import BatchLoader, validation_batches
from megatron_ext.data.packing import pack
from megatron_ext.errors import UserError

S, SEED, VOCABULARY = 32, 5, 1000
LENGTHS = [32, 31, 2, 7, 9, 20, 12, 5, 5, 5, 30, 16, 16, 3, 11, 8, 26, 6]


def best_filling(longest: int, others: list[int], capacity: int) -> int:
    """How full the best subset of the others makes the row of the longest."""
    totals = {longest}
    for length in others:
        totals |= {total + length for total in totals if total + length <= capacity}
    return max(totals)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """By trying every set of sequences as a row."""
    subsets = range(1 << len(lengths))
    total = [sum(x for i, x in enumerate(lengths) if chosen >> i & 1) for chosen in subsets]
    fewest = [0] + [len(lengths)] * (len(subsets) - 1)
    for chosen in subsets[1:]:
        part = chosen
        while part:
            if total[part] <= capacity:
                fewest[chosen] = min(fewest[chosen], 1 + fewest[chosen ^ part])
            part = (part - 1) & chosen
    return fewest[-1]


@pytest.mark.parametrize("capacity", [1, 7, 64, 500])
def test_each_row_is_filled_as_well_as_what_is_left_allows(capacity: int) -> None:
    random = np.random.default_rng(capacity)
    for trial in range(20):
        if trial % 2:
            lengths = random.integers(1, capacity + 1, random.integers(1, 90))
        else:
            lengths = np.minimum(random.geometric(4 / (capacity + 3), 90), capacity)
        rows = pack(lengths, capacity)
        assert rows.tolist() == pack(lengths, capacity).tolist()
        left = sorted(lengths.tolist())
        for row in range(rows.max() + 1):
            longest, *others = left[::-1]
            members = lengths[rows == row].tolist()
            assert sum(members) == best_filling(longest, others, capacity) and longest in members
            for length in members:
                left.remove(length)
        assert not left
    for bad in ([0, 1], [1, capacity + 1]):
        with pytest.raises(ValueError):
            pack(np.array(bad), capacity)


def test_few_sequences_against_the_optimum() -> None:
    random = np.random.default_rng(0)
    more = 0
    for _ in range(60):
        lengths = random.integers(1, 41, 8)
        more += int(pack(lengths, 50).max()) + 1 - fewest_rows(lengths.tolist(), 50)
    assert 0 <= more <= 2


@pytest.mark.parametrize(("median", "spread"), [(60, 0.5), (150, 0.8), (185, 0.3), (200, 0.4)])
def test_conversations_of_usual_lengths_waste_at_most_2_percent(
    median: float, spread: float
) -> None:
    capacity = 512
    drawn = np.random.default_rng(1).lognormal(np.log(median), spread, 20_000)
    lengths = np.clip(drawn.astype(int), 8, capacity)
    rows = int(pack(lengths, capacity).max()) + 1
    assert rows * capacity * 0.98 <= lengths.sum()


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
