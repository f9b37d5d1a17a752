"""Partition of a dense LLaMA at LLaMA-2-7B's shapes beside `cp` of the same bytes.

    python benchmarks/convert.py --folder /data/scratch
    python benchmarks/convert.py --folder /data/scratch --layers 4

Needs twice the model's size of disk (28 GB for 32 layers). The weights are synthetic fp16 in
sharded safetensors. Before each run the source is put out of the page cache, as far as a process
without privileges can.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from report import row, write

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_llama.py"
HIDDEN, FFN, VOCAB, HEADS = 4096, 11008, 32000, 32
LAYERS_PER_SHARD = 4
MEMORY_BAR_MIB, WALL_BAR, CPU_BAR = 3 * 1024, 2.0, 5.0


class Cost(NamedTuple):
    """What a process took."""

    wall: float
    """s"""
    cpu: float
    """s, user and system"""
    memory: float
    """MiB, largest resident set"""


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    square, vector = (HIDDEN, HIDDEN), (HIDDEN,)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{part}_proj": square for part in "qkvo"},
        **{f"mlp.{part}_proj": (FFN, HIDDEN) for part in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, FFN),
        **{f"{place}_layernorm": vector for place in ("input", "post_attention")},
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def make_model(folder: Path, layers: int) -> None:
    """Write config.json and the weights: one random block over and over, rotated by tensor."""
    import numpy as np
    from safetensors.numpy import save_file

    table = (VOCAB, HIDDEN)
    shards: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            "model.norm.weight": (HIDDEN,),
        }
    ]
    for first in range(0, layers, LAYERS_PER_SHARD):
        shard: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, layers)):
            shard |= layer_shapes(layer)
        shards.append(shard)
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 24, np.float32) * 0.02).astype(np.float16)
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            key: np.resize(np.roll(block, int(rng.integers(len(block)))), shape)
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(command: list[str], log: Path) -> Cost:
    """Run a command to its end."""
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def make_cold(folder: Path) -> None:
    """Have the disk hold all that was written, and the page cache nothing of the folder."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench(folder: Path, layers: int, experts: int, repeats: int) -> None:
    source, output = folder / "dense", folder / "output"
    source.mkdir()
    # In its own process: a child's peak of memory starts from its parent's.
    subprocess.run(
        [sys.executable, __file__, "--make", source, "--layers", str(layers)], check=True
    )
    size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
    convert = [sys.executable, str(TOOL), "partition", "--source", str(source)]
    convert += ["--output", str(output), "--num-experts", str(experts), "--skip-verify"]
    commands = {"cp": ["cp", "-r", "--reflink=never", str(source), str(output)], "ours": convert}
    costs: dict[str, list[Cost]] = {"cp": [], "ours": []}
    for _ in range(repeats):
        for name, command in commands.items():
            make_cold(folder)
            costs[name].append(measure(command, folder / f"{name}.log"))
            print(name, *(f"{key} {x:.1f}" for key, x in costs[name][-1]._asdict().items()))
            shutil.rmtree(output)

    def median(name: str, of: Callable[[Cost], float]) -> float:
        return statistics.median(of(cost) for cost in costs[name])

    what = f"partition of {layers} layers, {size:.1f} GB, E={experts}, against cp"
    cpu = [median(name, lambda cost: cost.cpu) for name in ("ours", "cp")]
    wall = [median(name, lambda cost: cost.wall) for name in ("ours", "cp")]
    memory = max(cost.memory for cost in costs["ours"])
    write(
        "convert" if layers == 32 else f"convert_{layers}_layers",
        [
            row(
                f"{what}: CPU",
                "s",
                cpu[0],
                limit=cpu[1],
                bar=CPU_BAR * cpu[1],
                higher_is_better=False,
            ),
            row(
                f"{what}: wall, cold cache",
                "s",
                wall[0],
                limit=wall[1],
                bar=WALL_BAR * wall[1],
                higher_is_better=False,
            ),
            row(
                f"{what}: peak memory",
                "MiB",
                memory,
                bar=MEMORY_BAR_MIB,
                higher_is_better=False,
            ),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(options.make, options.layers)
        return
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * FFN)
    needed = 2.1 * (options.layers * layer + 4 * VOCAB * HIDDEN) / 1e9
    free = shutil.disk_usage(options.folder).free / 1e9
    if free < needed:
        sys.exit(f"{options.folder} has {free:.0f} GB free, {needed:.0f} are needed: see --folder")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        bench(Path(scratch), options.layers, options.num_experts, options.repeats)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
