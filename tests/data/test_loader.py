import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.data.blend import BlendPlan
from megatron_ext.data.loader import BatchLoader, MicroBatch, validation_batches
from megatron_ext.data.stream import TokenStream
from megatron_ext.errors import UserError

SEQ_LENGTH = 8
SEED = 3
NAMES = ["web", "code", "books"]
SAMPLES = [60, 25, 40]
KEYS = {"tokens", "labels", "loss_mask", "position_ids", "domain"}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStream]:
    """Token t of domain d is 1000 d + t, so that a token tells domain and place."""
    folder = tmp_path_factory.mktemp("domains")
    streams = []
    for domain, (name, samples) in enumerate(zip(NAMES, SAMPLES, strict=True)):
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=np.uint16)
        tokens = 1000 * domain + np.arange(samples * SEQ_LENGTH + 1)
        for document in np.array_split(tokens, 7):
            builder.add_document(document, [len(document)])
        builder.finalize(f"{folder}/{name}.idx")
        streams.append(TokenStream(folder / name, SEQ_LENGTH, SEED, name))
    return streams


def make_plan(**options: Any) -> BlendPlan:
    return BlendPlan(NAMES, SAMPLES, [0.5, 0.3, 0.2], SEED, **options)


def make_loader(
    streams: list[TokenStream],
    rank: int = 0,
    size: int = 1,
    micro: int = 2,
    plan: BlendPlan | None = None,
    **options: Any,
) -> BatchLoader:
    return BatchLoader(plan or make_plan(), streams, micro, rank, size, SEQ_LENGTH, **options)


def firsts(batch: list[MicroBatch]) -> list[list[int]]:
    """The first token of every sample of every micro-batch, which identifies the sample."""
    return [micro["tokens"][:, 0].tolist() for micro in batch]


# A run with a ramp-up of the batch size and two weight changes.
SIZES = [8] * 5 + [16] * 5 + [24] * 5
CHANGES = {3: [0.1, 0.1, 0.8], 9: [0.0, 0.7, 0.3]}


def run(loader: BatchLoader, start: int = 0, stop: int = len(SIZES)) -> list[list[list[int]]]:
    batches = []
    for step in range(start, stop):
        batches.append(firsts(loader.next(SIZES[step])))
        if step in CHANGES:
            loader.plan.schedule(CHANGES[step], loader.plan.step, f"after {step}")
    return batches


def test_micro_batches_hold_what_the_plan_says(streams: list[TokenStream]) -> None:
    plan, loader = make_plan(), make_loader(streams, micro=4)
    for size in (8, 8, 16):
        batch, got = plan.next_batch(size), loader.next(size)
        assert len(got) == size // 4
        for place, micro in enumerate(got):
            assert set(micro) == KEYS
            slots = slice(4 * place, 4 * place + 4)
            for row, (domain, draw) in enumerate(
                zip(batch.domain[slots], batch.draw[slots], strict=True)
            ):
                sample = streams[domain].sample(int(draw))
                assert micro["domain"][row] == domain
                assert micro["tokens"][row].tolist() == sample[:-1].tolist()
                assert micro["labels"][row].tolist() == sample[1:].tolist()
            assert micro["tokens"].dtype == micro["labels"].dtype == torch.int64
            assert micro["domain"].dtype == micro["position_ids"].dtype == torch.int64
            assert micro["loss_mask"].dtype == torch.float32
            assert micro["loss_mask"].eq(1).all()
            assert micro["position_ids"].eq(torch.arange(SEQ_LENGTH)).all()
            assert all(tensor.is_contiguous() for tensor in micro.values())
    loader.close()


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_micro_batches_for_every_data_parallel_size(
    streams: list[TokenStream], size: int
) -> None:
    alone = run(make_loader(streams))
    ranks = [run(make_loader(streams, rank, size)) for rank in range(size)]
    for step, batch in enumerate(alone):
        # Micro-batch m of rank r is number m * size + r.
        together = [
            micro for group in zip(*(r[step] for r in ranks), strict=True) for micro in group
        ]
        assert together == batch


def test_an_epoch_of_each_domain_is_read_once(streams: list[TokenStream]) -> None:
    loader = make_loader(streams, plan=make_plan(max_epochs=1))
    seen = []
    for _ in range(sum(SAMPLES) // 4):
        seen += [token for micro in firsts(loader.next(4)) for token in micro]
    everything = [
        1000 * domain + SEQ_LENGTH * sample
        for domain, samples in enumerate(SAMPLES)
        for sample in range(samples)
    ]
    assert len(set(seen)) == len(seen) == 124 and set(seen) < set(everything)
    with pytest.raises(UserError, match="used up"):
        loader.next(4)


@pytest.mark.parametrize("lag, prefetch", [(0, 2), (1, 2), (3, 2), (2, 0)])
def test_prefetching_changes_nothing(streams: list[TokenStream], lag: int, prefetch: int) -> None:
    direct = make_loader(streams, plan=make_plan(lag=lag), prefetch=0)
    ahead = make_loader(streams, plan=make_plan(lag=lag), prefetch=prefetch)
    assert run(ahead) == run(direct)
    assert ahead.state_dict() == direct.state_dict()


@pytest.mark.parametrize("size", [1, 2])
def test_resume_at_every_step_on_another_grid(streams: list[TokenStream], size: int) -> None:
    expected = run(make_loader(streams))
    for stop in range(len(SIZES)):
        first = make_loader(streams)
        run(first, 0, stop)
        state = json.dumps(first.state_dict())
        assert json.loads(state)["step"] == stop  # what was handed out, not what was read ahead
        ranks = [make_loader(streams, rank, size) for rank in range(size)]
        for loader in ranks:
            loader.load_state_dict(json.loads(state))
        rest = [run(loader, stop) for loader in ranks]
        for step, batch in enumerate(expected[stop:]):
            assert [
                m for group in zip(*(r[step] for r in rest), strict=True) for m in group
            ] == batch


def test_a_restored_state_discards_what_was_read_ahead(streams: list[TokenStream]) -> None:
    loader = make_loader(streams, plan=make_plan(lag=2))
    state = loader.state_dict()
    expected = run(loader, 0, 3)
    loader.load_state_dict(state)
    assert run(loader, 0, 3) == expected


def test_reading_ahead_is_in_the_background_and_bounded_by_the_lag(
    streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = BatchLoader._read

    def recording(self: BatchLoader, batch: Any) -> list[MicroBatch]:
        read.append(batch.step)
        return original(self, batch)

    monkeypatch.setattr(BatchLoader, "_read", recording)
    loader = make_loader(streams, plan=make_plan(lag=2), prefetch=5)
    for step in range(4):
        loader.next(8)
        deadline = time.monotonic() + 10
        while len(read) < step + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert sorted(read) == list(range(step + 3))
    loader.close()


def test_a_failing_read_is_raised_where_the_batch_is_asked_for(
    streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(streams)
    loader.next(8)

    def broken(index: int) -> np.ndarray:
        raise OSError("the disk is gone")

    for stream in streams:
        monkeypatch.setattr(stream, "read", broken)
    with pytest.raises(OSError, match="disk is gone"):
        for _ in range(3):
            loader.next(8)


def test_stages_without_tokens_agree_on_the_domains(streams: list[TokenStream]) -> None:
    reading = make_loader(streams, 1, 2)
    blind = BatchLoader(make_plan(), [], 2, 1, 2, SEQ_LENGTH, read_tokens=False)
    for size in SIZES:
        for full, bare in zip(reading.next(size), blind.next(size), strict=True):
            assert set(bare) == {"domain"} and bare["domain"].dtype == torch.int64
            assert torch.equal(full["domain"], bare["domain"])


def test_what_follows_the_end_of_a_document_is_not_scored(streams: list[TokenStream]) -> None:
    loader = BatchLoader(
        BlendPlan(["web"], [60], [1], SEED), streams[:1], 60, 0, 1, SEQ_LENGTH, eod_id=11
    )
    (micro,) = loader.next(60)
    assert (micro["loss_mask"] == 0).sum() == 1
    assert micro["tokens"][micro["loss_mask"] == 0].tolist() == [11]


def test_every_rank_gets_the_mixture(streams: list[TokenStream]) -> None:
    for rank in range(4):
        loader = BatchLoader(make_plan(), [], 1, rank, 4, SEQ_LENGTH, read_tokens=False)
        domains = torch.cat([m["domain"] for _ in range(100) for m in loader.next(16)])
        share = torch.bincount(domains, minlength=3) / len(domains)
        assert (share - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.07


class TestRefusals:
    def test_batch_size(self, streams: list[TokenStream]) -> None:
        loader = make_loader(streams, 1, 2)
        before = loader.state_dict()
        for size in (0, 6, -4):
            with pytest.raises(UserError, match="multiple of 4"):
                loader.next(size)
        assert loader.state_dict() == before

    def test_grid(self, streams: list[TokenStream]) -> None:
        for rank, size, micro in [(2, 2, 1), (-1, 2, 1), (0, 1, 0)]:
            with pytest.raises(UserError):
                make_loader(streams, rank, size, micro)

    def test_streams_that_are_not_the_plan_s(self, streams: list[TokenStream]) -> None:
        for wrong in (streams[:2], [None, *streams[1:]], streams[::-1]):
            with pytest.raises(UserError):
                BatchLoader(make_plan(), wrong, 1, 0, 1, SEQ_LENGTH)
        with pytest.raises(UserError):
            BatchLoader(make_plan(), streams, 1, 0, 1, SEQ_LENGTH + 1)

    def test_an_empty_domain_needs_no_stream(self, streams: list[TokenStream]) -> None:
        plan = BlendPlan([*NAMES, "nothing"], [*SAMPLES, 0], [1, 1, 1, 1], SEED)
        loader = BatchLoader(plan, [*streams, None], 2, 0, 1, SEQ_LENGTH)
        assert max(int(m["domain"].max()) for m in loader.next(24)) == 2


class TestValidation:
    @pytest.mark.parametrize("size", [1, 2, 4])
    @pytest.mark.parametrize("samples", [1, 5, 24, 25])
    def test_each_sample_once_in_the_same_micro_batches(
        self, streams: list[TokenStream], samples: int, size: int
    ) -> None:
        ranks = [
            list(validation_batches(streams[1], samples, 3, rank, size, domain=1))
            for rank in range(size)
        ]
        assert len({len(batches) for batches in ranks}) == 1  # forward passes are collective
        in_order = [micro for group in zip(*ranks, strict=True) for micro in group]
        read = []
        for place, micro in enumerate(in_order):
            assert set(micro) == KEYS and micro["tokens"].shape == (3, SEQ_LENGTH)
            assert micro["domain"].tolist() == [1, 1, 1]
            present = micro["loss_mask"].all(dim=1)
            assert torch.equal(present, micro["loss_mask"].any(dim=1))
            assert present.tolist() == [3 * place + row < samples for row in range(3)]
            read += micro["tokens"][present].tolist()
        assert read == [streams[1].sequential(i)[:-1].tolist() for i in range(samples)]

    def test_more_samples_than_there_are(self, streams: list[TokenStream]) -> None:
        for samples in (0, 26):
            with pytest.raises(UserError, match="domain code"):
                list(validation_batches(streams[1], samples, 3, 0, 1))
