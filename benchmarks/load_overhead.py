"""What router loads cost: a training step with the ledger and without it, taken in turns.

Beside it the probe of the paper (held-out samples of every data set in evaluation mode), and the
decision itself. The peer is the same step without counting; cost is CPU time, all on one process.

    make bench-load_overhead         (--rounds 15 --threads 2)
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH, BATCH, INTERVAL = 512, 4, 100
DOMAINS = ("code", "books", "wiki", "math", "web")


@dataclass
class Options:
    rounds: int = 15
    """Steps with the ledger and steps without."""
    threads: int = 2
    """Threads of the process."""
    probe_samples: int = 16
    """Held-out samples of each data set in a probe; the paper's 80 cost five times as much."""


def make_trainer(folder: Path, options: Options) -> Any:
    """8 layers of 512, 16 experts of 128, top-4; five data sets of random tokens."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_ext import config
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer

    random = np.random.default_rng(0)
    for name in DOMAINS:
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        tokens = random.integers(0, 4096, 64 * LENGTH)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(str(folder / f"{name}.idx"))
    domains = {
        name: config.DomainConfig(str(folder / name), valid_path=str(folder / name))
        for name in DOMAINS
    }
    run = config.RunConfig(
        model=config.ModelConfig(
            num_layers=8,
            hidden_size=512,
            ffn_hidden_size=2048,
            num_attention_heads=8,
            vocab_size=4096,
            num_experts=16,
            moe_router_topk=4,
        ),
        data=config.DataConfig(seq_length=LENGTH, domains=domains),
        mixing=config.MixingConfig(
            strategy="router_load",
            interval=10**6,  # decided on below
            signal="probe",
            probe_samples=options.probe_samples,
        ),
        training=config.TrainingConfig(
            micro_batch_size=BATCH,
            global_batch_size=BATCH,
            device="cpu",
            threads=options.threads,
            train_iters=10**6,
        ),
    )
    grid = grids.initialize(run)
    return Trainer(run, grid, open_data(run, 0, 1, True))


def cpu_seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    import tyro
    from report import row, write
    from tqdm import tqdm

    options = tyro.cli(Options, description=__doc__)
    # Spinning OpenMP threads would count as work.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

    from megatron_ext.training import held_out

    with tempfile.TemporaryDirectory() as temporary:
        trainer = make_trainer(Path(temporary), options)
        passes, mixing = trainer.passes, trainer.data.mixing
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in tqdm(range(2 * options.rounds + 2), unit="step"):
            counted = turn % 2 == 0
            passes.use_ids(len(DOMAINS), count_loads=counted)
            seconds = cpu_seconds(trainer.train_step)
            if turn >= 2:  # one of each to warm up
                times[counted].append(seconds)
        passes.use_ids(len(DOMAINS))
        probe = statistics.median(
            cpu_seconds(lambda: held_out.probe(passes, trainer.data)) for _ in range(3)
        )
        probed = held_out.probe(passes, trainer.data)
        decision = cpu_seconds(lambda: mixing.update(trainer.iteration, probed))
    plain = statistics.median(times[False])
    # Steps that follow each other share what the machine does meanwhile: compared pair by pair.
    extra = statistics.median(a - b for a, b in zip(times[True], times[False], strict=True))
    interval = INTERVAL * plain
    write(
        "load_overhead",
        [
            row("training step, CPU time", "s", plain + extra, plain, None, 1.01 * plain, False),
            row("loads, share of a step", "%", 100 * extra / plain, None, None, 1.0, False),
            row(
                f"probe of {options.probe_samples} samples every {INTERVAL} steps, share",
                "%",
                100 * probe / interval,
                None,
                None,
                None,
                False,
            ),
            row(
                f"decision every {INTERVAL} steps, share",
                "%",
                100 * decision / interval,
                None,
                None,
                None,
                False,
            ),
        ],
    )


if __name__ == "__main__":
    main()
