"""Fine-tuning on packed rows beside padded ones (a conversation a row), on the same conversations.

    make bench-packing            (ARGS="--data-dir TALKS", of tools/preprocess_data.py --task sft)

CPU time of steps of a small MoE, turn by turn in one process. The limit of a step is one on rows
that text fills to the last token; the limit of packing is a lower bound on rows (Martello and Toth,
Discrete Applied Mathematics 28, 1990, L2), or for its speed the sorting of the lengths.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import Row, row, write

ROWS = 8
"""Of a step."""
SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "num_experts": 8,
    "moe_router_topk": 2,
    "untie_embeddings_and_output_weights": False,
}


@dataclass
class Options:
    data_dir: Path | None = None
    """Folder of tokenised conversations; none: random ones of log-normal lengths."""
    seq_length: int = 512
    """Tokens in a row."""
    rounds: int = 7
    """Timed steps of each side, after one to warm up."""
    threads: int = 1
    """Of torch."""


def write_random(folder: Path, seq_length: int) -> None:
    """Four data sets of 4,000 conversations each; half of the tokens are trained."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    for name, median in {"short": 60, "middle": 130, "long": 260, "mixed": 180}.items():
        spread = 1.0 if name == "mixed" else 0.5
        drawn = random.lognormal(np.log(median), spread, 4000).astype(int)
        lengths = np.clip(drawn, 8, seq_length)
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for length in lengths.tolist():
            builder.add_document(torch.from_numpy(random.integers(0, 8192, length)), [length])
        builder.finalize(str(folder / f"{name}.idx"))
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        mask = inside >= np.repeat(lengths // 2, lengths)
        (folder / f"{name}.mask").write_bytes(mask.astype(np.uint8).tobytes())


def fewest_rows(lengths: NDArray[Any], capacity: int) -> int:
    """A lower bound on rows: long sequences need one each, and leave so much room to the others."""
    lengths = lengths.astype(np.int64)
    bound = 0
    for least in range(capacity // 2 + 1):
        alone = lengths > capacity - least
        large = (lengths > capacity // 2) & ~alone
        small = (lengths <= capacity // 2) & (lengths >= least)
        room = large.sum() * capacity - lengths[large].sum()
        more = max(0, -(-int(lengths[small].sum() - room) // capacity))
        bound = max(bound, int(alone.sum() + large.sum()) + more)
    return bound


def waste(prefixes: list[Path], seq_length: int) -> list[Row]:
    from megatron_ext.data.conversation_stream import ConversationStream

    rows = []
    for prefix in prefixes:
        packed = ConversationStream(prefix, seq_length, 0, prefix.name, "packed")
        padded = ConversationStream(prefix, seq_length, 0, prefix.name, "padded")
        least = fewest_rows(np.asarray(packed._lengths), seq_length)
        rows.append(
            row(
                f"{prefix.name}: positions without a token, rows of {seq_length}",
                "%",
                100 * packed.waste,
                100 * padded.waste,
                100 * (1 - packed.num_tokens / (least * seq_length)),
                bar=2.0,
                higher_is_better=False,
            )
        )
    return rows


def throughput(prefixes: list[Path], options: Options) -> Row:
    """Trained tokens of an epoch by the CPU time of its rows."""
    from megatron_ext.config import (
        DataConfig,
        DomainConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        TrainingConfig,
    )
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer

    def make_run(paths: list[Path], **data: Any) -> RunConfig:
        domains = {path.name: DomainConfig(str(path)) for path in paths}
        return RunConfig(
            model=ModelConfig(vocab_size=vocabulary, **SHAPE),
            data=DataConfig(domains=domains, seq_length=options.seq_length, **data),
            optimizer=OptimizerConfig(lr_decay_style="constant", lr_warmup_iters=0),
            training=TrainingConfig(
                micro_batch_size=ROWS,
                global_batch_size=ROWS,
                device="cpu",
                threads=options.threads,
            ),
        )

    dtype = {path: _dtype(path) for path in prefixes}
    tokens = {path: np.memmap(f"{path}.bin", dtype[path], "r") for path in prefixes}
    vocabulary = 1 + max(int(part.max()) for part in tokens.values())
    with tempfile.TemporaryDirectory() as folder:
        for path in prefixes:  # the same tokens without their mask: plain text
            for suffix in ("bin", "idx"):
                os.symlink(path.with_name(f"{path.name}.{suffix}").absolute(),
                           Path(folder, f"{path.name}.{suffix}"))  # fmt: skip
        runs = {
            "packed": make_run(prefixes, task="sft", packing="packed"),
            "padded": make_run(prefixes, task="sft", packing="padded"),
            "full": make_run([Path(folder, path.name) for path in prefixes]),
        }
        grid = grids.initialize(runs["packed"])
        data = {side: open_data(run, 0, 1, True) for side, run in runs.items()}
        trainers = {side: Trainer(run, grid, data[side]) for side, run in runs.items()}
        times: dict[str, list[float]] = {side: [] for side in runs}
        for _ in range(options.rounds + 1):
            for side, trainer in trainers.items():
                times[side].append(cpu_seconds(trainer.train_step))
        trained = sum(int(np.fromfile(f"{path}.mask", np.uint8).sum()) for path in prefixes)
        rates = {}
        for side, found in times.items():
            rows = int(data[side].plan.num_samples.sum())
            rates[side] = trained / (rows * statistics.median(found[1:]) / ROWS)
            data[side].loader.close()
        grids.close()
    return row(
        f"fine-tuning, rows of {options.seq_length}, an epoch of all data sets",
        "trained tokens / CPU-s",
        rates["packed"],
        rates["padded"],
        rates["full"],
    )


def speed() -> Row:
    from megatron_ext.data.packing import pack

    drawn = np.random.default_rng(0).lognormal(np.log(300), 0.8, 10**6)
    lengths = np.clip(drawn.astype(int), 1, 2048)
    ours = statistics.median(cpu_seconds(lambda: pack(lengths, 2048)) for _ in range(3))
    limit = statistics.median(
        cpu_seconds(lambda: np.argsort(lengths, kind="stable")) for _ in range(3)
    )
    what = "packing 1e6 conversations into rows of 2048"
    return row(what, "CPU-s", ours, limit=limit, bar=10.0, higher_is_better=False)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call, of all threads of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def _dtype(prefix: Path) -> np.dtype[Any]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return np.dtype(IndexedDataset(str(prefix)).index.dtype)


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data_dir or Path(temporary)
        if options.data_dir is None:
            write_random(folder, options.seq_length)
        root = folder / "train" if (folder / "train").is_dir() else folder
        prefixes = [path.with_suffix("") for path in sorted(root.glob("*.idx"))]
        rows = [*waste(prefixes, options.seq_length), throughput(prefixes, options), speed()]
    write("packing", rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
