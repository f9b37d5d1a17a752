"""Small real runs that the tests of this folder share: three domains, a MoE of 4 layers and 8
experts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import (
    CheckpointConfig,
    DataConfig,
    DomainConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    TrainingConfig,
)

DOMAINS = ("code", "wiki", "books")
VOCABULARY = 128


def write_data(root: Path) -> None:
    """Domains a model can learn from: noisy counting, each with its own stride."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    for number, name in enumerate(DOMAINS):
        builder = IndexedDatasetBuilder(str(root / f"{name}.bin"), dtype=np.uint16)
        for _ in range(40):
            tokens = (random.integers(VOCABULARY) + (2 * number + 1) * np.arange(120)) % VOCABULARY
            noise = random.random(120) < 0.2
            tokens[noise] = random.integers(0, VOCABULARY, noise.sum())
            builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [120])
        builder.finalize(str(root / f"{name}.idx"))


def make_run(
    root: Path,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **checkpoint: Any,
) -> RunConfig:
    """A run of 20 steps of 4 samples of 32 tokens."""
    return RunConfig(
        model=ModelConfig(
            **{
                "num_layers": 4,
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 64,
                "num_experts": 8,
                "moe_score_scale": 4.0,
                **(model or {}),
            }
        ),
        router=RouterConfig(**(router or {})),
        parallel=ParallelConfig(**(parallel or {})),
        data=DataConfig(
            seq_length=32,
            domains={
                name: DomainConfig(str(root / name), valid_path=str(root / name))
                for name in DOMAINS
            },
            eval_samples=6,
        ),
        optimizer=OptimizerConfig(
            **{"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 3, **(optimizer or {})}
        ),
        training=TrainingConfig(
            **{
                "train_iters": 20,
                "micro_batch_size": 1,
                "global_batch_size": 4,
                "device": "cpu",
                **(training or {}),
            }
        ),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def make_trainer(run: RunConfig) -> Any:
    """The trainer of this rank, loaded as pretrain_moe.py does it."""
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer, write_recipe

    grid = grids.initialize(run)
    data = open_data(run, grid.data_rank, grid.data_size, grid.reads_tokens)
    write_recipe(run, run.checkpoint.save, grid.is_main)
    trainer = Trainer(run, grid, data)
    trainer.load()
    return trainer


def losses(run: RunConfig, steps: int) -> list[float]:
    """Losses of the next steps of a run."""
    trainer = make_trainer(run)
    return [trainer.train_step().loss for _ in range(steps)]


def train_and_save(run: RunConfig, steps: int) -> list[float]:
    trainer = make_trainer(run)
    result = [trainer.train_step().loss for _ in range(steps)]
    trainer.save()
    return result


def fingerprint(trainer: Any) -> str:
    """Hash of this rank's weights, optimizer state and place in the sample order."""
    digest = hashlib.sha256()
    for chunk in trainer.model:
        for name, parameter in sorted(chunk.named_parameters()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    for part in trainer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            digest.update(f"{group['lr']} {group['weight_decay']}".encode())
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    digest.update(state[key].numpy().tobytes())
    digest.update(repr(trainer.data.loader.state_dict()).encode())
    return digest.hexdigest()
