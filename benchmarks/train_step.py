"""A training step: ours beside transformers' MixtralForCausalLM, same shape, weights and tokens.

Each side runs in a process of its own, turn by turn, with the same number of threads: forward,
    backward, balance loss, gradient clipping, AdamW (both with torch's fused kernel). The peer's
    experts run in the way that transformers chooses on this machine. One more step is profiled:
    matrix products and attention are the same kernels of torch on both sides, so what they take is
    what neither side can go below.

    make bench-train_step            (--rounds 3 --threads 2 --steps 3)
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES, LENGTH = 4, 512
LEARNING_RATE, AUX = 1e-4, 0.01

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M, 8 x 192, top-2": {
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "vocab_size": 49152,
        "untie_embeddings_and_output_weights": False,
        "num_experts": 8,
        "moe_router_topk": 2,
    },
    "512 wide, 8 layers, 16 x 128, top-4": {
        "num_layers": 8,
        "hidden_size": 512,
        "ffn_hidden_size": 2048,
        "num_attention_heads": 8,
        "vocab_size": 4096,
        "num_experts": 16,
        "moe_router_topk": 4,
    },
}
BARS = dict(zip(SHAPES, (1.0, 1.3), strict=True))
# torch's own kernels, the same on both sides: nobody's step is faster than these.
KERNELS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)


@dataclass
class Options:
    rounds: int = 3
    """Turns of each side."""
    steps: int = 3
    """Timed steps in a turn (after one to warm up)."""
    threads: int = 2
    """Threads of each side."""


def make_run(shape: str, folder: Path, threads: int) -> Any:
    from megatron_ext.config import (
        CheckpointConfig,
        DataConfig,
        DomainConfig,
        ModelConfig,
        OptimizerConfig,
        RouterConfig,
        RunConfig,
        TrainingConfig,
    )

    return RunConfig(
        model=ModelConfig(**SHAPES[shape]),
        router=RouterConfig(moe_balance_loss="aux_loss", moe_aux_loss_coeff=AUX),
        data=DataConfig(seq_length=LENGTH, domains={"text": DomainConfig(str(folder / "text"))}),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant", lr_warmup_iters=0),
        training=TrainingConfig(
            micro_batch_size=SAMPLES, global_batch_size=SAMPLES, device="cpu", threads=threads
        ),
        checkpoint=CheckpointConfig(load=str(folder / "moe")),
    )


def prepare(shape: str, folder: Path, threads: int) -> None:
    """Random tokens, and random weights as our checkpoint and as a Hugging Face directory."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer, write_recipe

    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    random = np.random.default_rng(0)
    tokens = random.integers(0, SHAPES[shape]["vocab_size"], 64 * LENGTH)
    builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(str(folder / "text.idx"))
    run = make_run(shape, folder, threads)
    run.checkpoint.load, run.checkpoint.save = None, str(folder / "moe")
    grid = grids.initialize(run)
    trainer = Trainer(run, grid, open_data(run, 0, 1, True))
    write_recipe(run, run.checkpoint.save, is_main=True)
    trainer.save()


def measure(step: Any, steps: int) -> dict[str, float]:
    import torch

    first = step()
    wall, cpu = [], []
    for _ in range(steps):
        started, used = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    sgemm = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, a)
        sgemm.append(2 * 1024**3 / (time.perf_counter() - started))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {
        "first_loss": first,
        "wall": statistics.median(wall),
        "cpu": statistics.median(cpu),
        "memory": memory,
        "sgemm": max(sgemm),
        "kernels": sum(spent.get(name, 0) for name in KERNELS) / sum(spent.values()),
    }


def ours(shape: str, folder: Path, options: Options) -> dict[str, float]:
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer

    run = make_run(shape, folder, options.threads)
    grid = grids.initialize(run)
    trainer = Trainer(run, grid, open_data(run, 0, 1, True))
    trainer.load()
    return measure(lambda: trainer.train_step().loss, options.steps)


def peer(shape: str, folder: Path, options: Options) -> dict[str, float]:
    import torch
    from transformers import MixtralForCausalLM

    from megatron_ext.training.data import open_data

    torch.set_num_threads(options.threads)
    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model.config.output_router_logits = True
    model.router_aux_loss_coef = AUX
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    loader = open_data(make_run(shape, folder, options.threads), 0, 1, True).loader

    def step() -> float:
        [batch] = loader.next(SAMPLES)
        out = model(input_ids=batch["tokens"], labels=batch["labels"], shift_labels=batch["labels"])
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss - AUX * out.aux_loss)

    return measure(step, options.steps)


def run_side(side: str, shape: str, folder: Path, options: Options) -> dict[str, float]:
    """One turn in a fresh process; spinning OpenMP threads would count as work."""
    command = [sys.executable, __file__, side, shape, str(folder), json.dumps(vars(options))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "PYTHONWARNINGS": "ignore",
    }
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(output.stdout.splitlines()[-1]) if side != "prepare" else {}


def main() -> None:
    import tyro
    from report import row, write
    from tqdm import tqdm

    from megatron_ext.config import ModelConfig
    from megatron_ext.training.flops import flops_per_token

    options = tyro.cli(Options, description=__doc__)
    rows, tokens = [], SAMPLES * LENGTH
    for shape in SHAPES:
        results: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            run_side("prepare", shape, folder, options)
            export = ["export", "--source", str(folder / "moe"), "--output", str(folder / "hf")]
            tool = Path(__file__).parents[1] / "tools" / "convert_llama.py"
            subprocess.run([sys.executable, str(tool), *export, "--skip-verify"], check=True)
            for _ in tqdm(range(options.rounds), desc=shape, unit="round"):
                for side, found in results.items():
                    found.append(run_side(side, shape, folder, options))
        mine, theirs = (
            {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            for turns in results.values()
        )
        difference = abs(mine["first_loss"] / theirs["first_loss"] - 1)
        assert difference < 1e-4, f"the sides do not compute the same loss: {mine} {theirs}"
        peak = max(turn["sgemm"] for turns in results.values() for turn in turns)
        work = flops_per_token(ModelConfig(**SHAPES[shape]), LENGTH) * tokens
        # The bar is on the ratio of the two sides in the same run.
        rate = tokens / theirs["cpu"]
        rows += [
            row(
                f"{shape}: throughput",
                "tokens / CPU-second",
                tokens / mine["cpu"],
                rate,
                tokens / (work / peak * options.threads),
                bar=BARS[shape] * rate,
            ),
            row(
                f"{shape}: throughput were all but products and attention free",
                "tokens / CPU-second",
                tokens / (mine["cpu"] * mine["kernels"]),
                rate,
            ),
            row(
                f"{shape}: share of products and attention",
                "%",
                100 * mine["kernels"],
                100 * theirs["kernels"],
            ),
            row(f"{shape}: step", "s", mine["wall"], theirs["wall"], work / peak, None, False),
            row(
                f"{shape}: MFU against sgemm",
                "%",
                100 * work / mine["wall"] / peak,
                100 * work / theirs["wall"] / peak,
                100.0,
            ),
            row(
                f"{shape}: peak memory",
                "MiB",
                mine["memory"] / 2**20,
                theirs["memory"] / 2**20,
                None,
                None,
                False,
            ),
        ]
    write("train_step", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("prepare", "ours", "peer"):
        chosen, of_shape, where, given = sys.argv[1:5]
        settings = Options(**json.loads(given))
        if chosen == "prepare":
            prepare(of_shape, Path(where), settings.threads)
        else:
            side = ours if chosen == "ours" else peer
            print(json.dumps(side(of_shape, Path(where), settings)))
    else:
        main()
