"""A job small enough for the launch scripts' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from training.runs import VOCABULARY, write_data

STEPS, SAVE_INTERVAL = 180, 100


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 180 steps on two ranks: a tiny MoE from random weights, experts on both."""
    root = tmp_path_factory.mktemp("job")
    for split in ("train", "valid"):
        (root / "data" / split).mkdir(parents=True)
        write_data(root / "data" / split)
    values = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "num_experts": 4,
        },
        "parallel": {"expert_model_parallel_size": 2},
        "data": {"data_dir": str(root / "data"), "seq_length": 32, "eval_samples": 4},
        "training": {"train_iters": STEPS, "global_batch_size": 4, "device": "cpu", "threads": 1},
        "checkpoint": {"save_interval": SAVE_INTERVAL},
        "logging": {"peak_tflops": 0.05},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(values))
    return root / "recipe.yaml"
