"""The live blend beside megatron-core's BlendedDataset: weight changes, opening, reading.

    python benchmarks/blend.py

Needs about 3 GB of memory (for the peer's index) and 1 GB of disk for a minute.
"""

import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from report import Row, row, write

SEQ_LENGTH = 2048
SAMPLES_OF_RUN = 10**8
WEIGHTS = [float(d) for d in range(1, 17)]
TOKENS_PER_DOMAIN = 12_500_000
REPEATS = 7


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call, of all threads of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(task: str, *arguments: object) -> list[float]:
    """Figures of a task run in a fresh process, so that its peak of memory is its own."""
    command = [sys.executable, "-W", "ignore", __file__, task, *map(str, arguments)]
    return [float(x) for x in subprocess.check_output(command, text=True).split()[-2:]]


# A weight change at 1e8 samples


class Sized:
    """A source of any length. Its own index, which the peer would also rebuild, is left out."""

    def __init__(self, size: int) -> None:
        from megatron.core.datasets.utils import Split

        self.size, self.index_split, self.unique_identifiers = size, Split.train, {"size": size}

    def __len__(self) -> int:
        return self.size


def peer_weight_change() -> None:
    from megatron.core.datasets import helpers  # noqa: F401
    from megatron.core.datasets.blended_dataset import BlendedDataset

    config = SimpleNamespace(
        path_to_cache=None,
        defer_npy_index_mmap=False,
        fast_cache_load=False,
        mid_level_dataset_surplus=0.005,
    )
    sources = [Sized(SAMPLES_OF_RUN) for _ in WEIGHTS]
    before = peak_mib()
    build = partial(BlendedDataset, sources, WEIGHTS, SAMPLES_OF_RUN, config)
    times = [cpu_seconds(build) for _ in range(3)]
    print(statistics.median(times), peak_mib() - before)


def our_weight_change() -> None:
    from megatron_ext.data.blend import BlendPlan

    names = [f"d{place}" for place in range(len(WEIGHTS))]
    plan = BlendPlan(names, [SAMPLES_OF_RUN // len(names)] * len(names), WEIGHTS, 0, lag=0)
    plan.next_batch(1024)
    before = peak_mib()
    changes = 200

    def change() -> None:
        for _ in range(changes):
            plan.schedule(WEIGHTS[::-1], plan.step, "benchmark")
            plan.next_batch(1024)

    times = [cpu_seconds(change) / changes for _ in range(REPEATS)]
    print(statistics.median(times), peak_mib() - before)


def weight_change() -> list[Row]:
    our_time, our_memory = in_process("our_weight_change")
    peer_time, peer_memory = in_process("peer_weight_change")
    what = f"weight change, {len(WEIGHTS)} domains, {SAMPLES_OF_RUN:.0e} samples"
    return [
        row(
            f"{what}: CPU, ours with the next batch of 1024",
            "ms",
            our_time * 1e3,
            peer_time * 1e3,
            bar=1.0,
            higher_is_better=False,
        ),
        row(
            f"{what}: memory, ours of 1,400 changes and their log",
            "MiB",
            our_memory,
            peer_memory,
            bar=10.0,
            higher_is_better=False,
        ),
    ]


# Opening a domain of 1e12 tokens


def write_sparse(prefix: str, documents: int) -> None:
    """The files of 1e12 tokens in equal documents, with holes for all but the end of the index."""
    length = 10**12 // documents
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, documents, documents + 1))
        stream.seek(4 * (documents - 1), os.SEEK_CUR)
        stream.write(struct.pack("<i", length))
        stream.seek(8 * (documents - 1), os.SEEK_CUR)
        stream.write(struct.pack("<q", (documents - 1) * length * 4))
        stream.seek(8 * documents, os.SEEK_CUR)
        stream.write(struct.pack("<q", documents))
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(4 * 10**12)


def open_domain(prefix: str) -> None:
    import megatron.core.datasets.indexed_dataset  # noqa: F401  the import is not the opening

    from megatron_ext.data.stream import TokenStream

    before, start = peak_mib(), time.perf_counter()
    stream = TokenStream(prefix, SEQ_LENGTH, 0, "web")
    stream.sample(123)
    print(time.perf_counter() - start, peak_mib() - before)


def opening() -> list[Row]:
    rows = []
    for documents in (500, 10**9):
        with tempfile.TemporaryDirectory() as folder:
            write_sparse(f"{folder}/web", documents)
            runs = [in_process("open_domain", f"{folder}/web") for _ in range(3)]
        seconds, memory = (statistics.median(figures) for figures in zip(*runs, strict=True))
        what = f"open 1e12 tokens in {documents:.0e} documents, read a sample"
        rows.append(row(f"{what}: time", "s", seconds, bar=1.0, higher_is_better=False))
        rows.append(row(f"{what}: memory", "MiB", memory, bar=300.0, higher_is_better=False))
    return rows


# Samples per CPU-second


def write_domain(prefix: str, seed: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    written = 0
    while written < TOKENS_PER_DOMAIN:
        document = rng.integers(0, 32_000, 1 + int(rng.exponential(1000)), dtype=np.int32)
        builder.add_document(document, [len(document)])
        written += len(document)
    builder.finalize(f"{prefix}.idx")


def peer_blend(prefixes: list[str], num_samples: int) -> Any:
    """BlendedDataset over GPTDatasets of the same files, at its fastest: no attention masks."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ_LENGTH,
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(vocab_size=32_000, eod=0, unique_identifiers={}),
    )
    sources = []
    for prefix in prefixes:
        low = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.arange(len(low), dtype=np.int32)
        sources.append(GPTDataset(low, prefix, documents, num_samples, Split.train, config))
    return BlendedDataset(sources, [1.0] * len(sources), num_samples, config)


def reading() -> list[Row]:
    import torch

    from megatron_ext.data.blend import BlendPlan
    from megatron_ext.data.loader import BatchLoader
    from megatron_ext.data.stream import TokenStream

    torch.set_num_threads(1)
    count = 2048  # in a turn; in all turns together less than an epoch, as no sample is read twice
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [f"{folder}/d{place}" for place in range(4)]
        for seed, prefix in enumerate(prefixes):
            write_domain(prefix, seed)
        streams = [TokenStream(p, SEQ_LENGTH, 0, f"d{d}") for d, p in enumerate(prefixes)]
        plan = BlendPlan(
            [s.name for s in streams], [s.num_samples for s in streams], [1.0] * 4, seed=0
        )
        loader = BatchLoader(plan, streams, 8, 0, 1, SEQ_LENGTH)
        blended = peer_blend(prefixes, count * (REPEATS + 1))
        maps = [np.memmap(f"{prefix}.bin", np.int32, "r") for prefix in prefixes]
        places = [(d, i) for d, s in enumerate(streams) for i in range(s.num_samples)]
        np.random.default_rng(0).shuffle(places)
        turns = [range(turn * count, (turn + 1) * count) for turn in range(REPEATS + 1)]

        def ours(turn: range) -> None:
            for _ in range(len(turn) // 256):
                loader.next(256)

        def peer(turn: range) -> None:
            for index in turn:
                blended[index]

        def raw(turn: range) -> None:
            for domain, place in places[turn.start : turn.stop]:
                start = place * SEQ_LENGTH
                maps[domain][start : start + SEQ_LENGTH + 1].astype(np.int64)

        # In turns, so that whatever else the machine does falls on all of them.
        rates = [
            [count / cpu_seconds(partial(read, turn)) for read in (ours, peer, raw)]
            for turn in turns
        ]
        loader.close()
    # The first turn warms up.
    our_rate, peer_rate, raw_rate = map(statistics.median, zip(*rates[1:], strict=True))
    what = f"read samples of {SEQ_LENGTH} tokens"
    return [
        row(
            f"{what}: BatchLoader (collated) and BlendedDataset[i]",
            "1/CPU-s",
            our_rate,
            peer_rate,
            bar=5 * peer_rate,
        ),
        row(
            f"{what}: BatchLoader and raw memory-map read as int64",
            "1/CPU-s",
            our_rate,
            limit=raw_rate,
            bar=raw_rate / 3,
        ),
    ]


def main() -> None:
    write("blend", weight_change() + opening() + reading())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    tasks: dict[str, Callable[..., None]] = {
        "our_weight_change": our_weight_change,
        "peer_weight_change": peer_weight_change,
        "open_domain": open_domain,
    }
    if len(sys.argv) > 1:
        tasks[sys.argv[1]](*sys.argv[2:])
    else:
        main()
