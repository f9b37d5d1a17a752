"""Instruction tuning as a user runs it: conversations in, a tuned MoE and its answers out."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.tiny import convert, save_llama
from commands import ROOT, run, torchrun
from data.chats import CHATML, save_chat_tokenizer
from transformers import AutoModelForCausalLM

from examples.demo import sums
from megatron_ext.checkpoint.layout import read_best
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import EXPERTS_FC1, ROUTER, layer_key

FINETUNE = ROOT / "finetune_moe.py"
STEPS, LENGTH = 12, 256


def conversations() -> dict[str, Iterator[dict[str, Any]]]:
    """Questions with true answers, in the three forms that people have."""
    numbers = random.Random(0)
    kinds = [sums.gcd, sums.product, sums.linear]
    functions = inspect.getmembers(textwrap, inspect.isfunction)
    functions += inspect.getmembers(random, inspect.ismethod) + inspect.getmembers(
        inspect, inspect.isfunction
    )
    yield_sums = (kinds[n % 3](numbers) for n in range(60))
    documented = [(name, f) for name, f in functions if f.__doc__]
    return {
        "sums": ({"instruction": ask, "input": "", "output": answer} for ask, answer in yield_sums),
        "manual": (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"What does {name} do?"},
                    {"role": "assistant", "content": str(f.__doc__).strip().split("\n\n")[0][:300]},
                ]
            }
            for name, f in documented
        ),
        "code": (
            {
                "conversations": [
                    {"from": "human", "value": f"What is the signature of {name}?"},
                    {"from": "gpt", "value": f"def {name}{inspect.signature(f)}"},
                ]
            }
            for name, f in documented
        ),
    }


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on TP2xEP2, then to twelve on one process; exported."""
    root = tmp_path_factory.mktemp("sft")
    tokenizer = save_chat_tokenizer(root / "tokenizer", CHATML)
    inputs = []
    for name, talks in conversations().items():
        text = "".join(json.dumps(talk) + "\n" for talk in talks)
        (root / f"{name}.jsonl").write_text(text)
        inputs.append(f"{name}={root / name}.jsonl")
    run(ROOT / "tools" / "preprocess_data.py", "--task", "sft", "--input", *inputs,
        "--output", root / "data", "--tokenizer", tokenizer, "--seq-length", LENGTH,
        "--valid-fraction", 0.1)  # fmt: skip
    save_llama(root / "dense", vocab_size=4096)
    convert("partition", "--source", root / "dense", "--output", root / "moe",
            "--num-experts", 4, "--tokenizer", tokenizer, "--skip-verify")  # fmt: skip
    options = ["--load", root / "moe", "--data-dir", root / "data", "--save", root / "run"]
    options += ["--device", "cpu", "--seq-length", LENGTH, "--global-batch-size", 4]
    options += ["--lr", "3e-3", "--min-lr", "1e-3", "--lr-warmup-iters", 2]
    options += ["--lr-decay-iters", STEPS, "--eval-interval", 6, "--eval-at-start", "True"]
    options += ["--eval-samples", 1, "--freeze", "router", "--keep-best", "True"]
    options += ["--strategy", "router_load", "--interval", 4, "--generate-tokens", 3]
    grid = ["--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2]
    run(*torchrun(2), FINETUNE, *options, *grid, "--train-iters", 6)
    run(*torchrun(1), FINETUNE, *options, "--train-iters", STEPS)
    convert("export", "--source", root / "run", "--output", root / "hf")
    return root


def test_it_learns_answers(tuned: Path) -> None:
    steps = rows(tuned, "train")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    held_out = rows(tuned, "valid")
    assert [row["step"] for row in held_out] == [0, 6, 12]
    for name in ("sums", "manual", "code"):
        assert held_out[-1][f"loss/{name}"] < held_out[0][f"loss/{name}"] - 0.5
    # Only answers are trained: fewer tokens than there are positions, and never none.
    assert all(0 < row["tokens"] < 4 * LENGTH for row in steps)


def test_the_routers_decide_and_stay(tuned: Path) -> None:
    updates = rows(tuned, "mixing")
    assert [row["step"] for row in updates] == [4, 8, 12]
    assert updates[0]["weight/sums"] != pytest.approx(1 / 3, abs=1e-6)
    before, after = CheckpointWeights(tuned / "moe"), CheckpointWeights(tuned / "run")
    for layer in after.model.moe_layers:
        router, experts = layer_key(layer, ROUTER), layer_key(layer, EXPERTS_FC1)
        assert torch.equal(before.tensor(router), after.tensor(router))
        assert not torch.equal(before.tensor(experts), after.tensor(experts))


def test_answers_are_logged(tuned: Path) -> None:
    samples = rows(tuned, "sample")
    assert [row["step"] for row in samples] == [0, 6, 12]
    for row in samples:
        for name in ("sums", "manual", "code"):
            assert row[name]["prompt"].endswith("<|im_start|>assistant\n")
            assert isinstance(row[name]["answer"], str)


def test_last_and_best_can_be_exported(tuned: Path) -> None:
    best = read_best(tuned / "run")
    assert best is not None and best[0] == STEPS
    model = AutoModelForCausalLM.from_pretrained(tuned / "hf")
    sample = rows(tuned, "sample")[-1]["sums"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned / "hf")
    ids = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == sample["answer"]
