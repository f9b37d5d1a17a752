"""UpIT with LoRA experts: a dense model tuned by LoRA, its checkpoints as experts, their tuning and
export, from the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.tiny import convert, save_llama
from commands import ROOT
from data.chats import write_conversations
from ranks import run_ranks

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.hf import open_weights
from megatron_ext.checkpoint.lora import as_dense, full_experts
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import EXPERTS_FC1, FC1, FC2, QKV, layer_key, lora_names
from megatron_ext.errors import UserError

GRID = ["--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2]


def finetune(*arguments: Any) -> None:
    """finetune_moe.py on this rank."""
    sys.path.insert(0, str(ROOT))
    sys.argv = ["finetune_moe.py", *map(str, arguments)]
    from finetune_moe import main

    main()


def export(source: Path, output: Path) -> str:
    """Name of the class that transformers reads an export as; its logits are compared."""
    convert("export", "--source", source, "--output", output)
    from transformers import AutoModelForCausalLM

    return type(AutoModelForCausalLM.from_pretrained(output)).__name__


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the tests look at: `dense`, `one`, `run`, `moe`, `tuned`."""
    path = tmp_path_factory.mktemp("upit_lora")
    save_llama(path / "dense", num_hidden_layers=2, vocab_size=128)
    (path / "data").mkdir()
    for seed, name in enumerate(("sums", "code")):
        write_conversations(path / "data", name, [9, 20, 32, 12, 8, 17, 30, 25] * 4, 128, seed=seed)
    convert("upcycle", "--source", path / "dense", "--output", path / "one", "--num-experts", 1,
            "--moe-router-topk", 1, "--lora-rank", 4, "--skip-verify")  # fmt: skip
    options = ["--data-dir", path / "data", "--device", "cpu", "--seq-length", 32, "--lr", "1e-2"]
    options += ["--global-batch-size", 4, "--lr-warmup-iters", 1, "--freeze", "base"]
    options += ["--eval-samples", 1]
    tuning = ["--load", path / "one", "--save", path / "run", "--train-iters", 6]
    tuning += ["--save-interval", 2, "--keep-latest", 0, "--moe-balance-loss", "none"]
    run_ranks(2, finetune, *options, *tuning)
    convert("upit", "--base", path / "dense", "--source", path / "run", "--iterations", "2,4,6",
            "--num-experts", 4, "--lora-rank", 4, "--output", path / "moe",
            "--skip-verify")  # fmt: skip
    post = ["--load", path / "moe", "--save", path / "tuned", "--train-iters", 3]
    run_ranks(2, finetune, *options, *post, *GRID)
    return path


def test_checkpoints_of_a_lora_run_lose_nothing(root: Path) -> None:
    construction = layout.read_construction(root / "moe")
    assert construction is not None and construction["options"]["lora_rank"] == 4
    for shares in construction["lost"].values():
        assert len(shares) == 4 and max(shares[:3]) < 1e-3 < shares[3]  # the child is of full rank
    moe = full_experts(CheckpointWeights(root / "moe"))
    base = open_weights(root / "dense").tensor(layer_key(1, FC1))
    for expert, iteration in enumerate((2, 4, 6)):
        tuned = as_dense(CheckpointWeights(root / "run", iteration)).tensor(layer_key(1, FC1))
        found = moe.tensor(layer_key(1, EXPERTS_FC1))[expert]
        assert (tuned - base).norm() > 0.01
        torch.testing.assert_close(found - base, tuned - base, rtol=0, atol=1e-5)


def test_tuning_moves_adapters_only(root: Path) -> None:
    dense, moe, tuned = (
        open_weights(root / "dense"),
        CheckpointWeights(root / "moe"),
        CheckpointWeights(root / "tuned"),
    )
    assert tuned.model == moe.model and tuned.model.lora_rank == 4 and tuned.iteration == 3
    for layer in range(2):
        for name in (FC1, FC2, QKV):
            key = layer_key(layer, name)
            assert torch.equal(tuned.tensor(key), dense.tensor(key))
        for names in lora_names(tuned.model.lora_targets).values():
            for key in (layer_key(layer, name) for name in names):
                assert not torch.equal(tuned.tensor(key), moe.tensor(key))


def test_transformers_reads_the_full_experts(root: Path) -> None:
    [name] = run_ranks(1, export, root / "tuned", root / "hf")
    assert name == "MixtralForCausalLM"


def test_options_that_have_no_meaning_are_refused(root: Path, tmp_path: Path) -> None:
    source = ["--source", root / "dense", "--output", tmp_path / "no"]
    with pytest.raises(UserError, match="lora_alpha has no meaning without lora_rank"):
        convert("upcycle", *source, "--lora-alpha", 4)
    with pytest.raises(UserError, match="LoRA experts start as the dense FFN"):
        convert("upcycle", *source, "--method", "drop_upcycling", "--lora-rank", 4)
    with pytest.raises(UserError, match="lora_rank=64 must lie between 1 and 48"):
        convert("upcycle", *source, "--lora-rank", 64)
    assert not (tmp_path / "no").exists()
