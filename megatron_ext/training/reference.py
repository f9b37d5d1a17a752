"""The first of the two runs of strategy `reference_loss`: uniform weights, held-out losses at its
end.

    SAVE/reference/                the run, as any other
    SAVE/reference/losses.json     written when it is finished

It starts where the run itself starts, on the same grid. Interrupted, either is resumed.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.layout import write_text
from megatron_ext.config import MixingConfig, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import make_strategy
from megatron_ext.mixing.strategies.base import whole
from megatron_ext.training.data import open_data
from megatron_ext.training.grid import Grid
from megatron_ext.training.trainer import Trainer, write_recipe

logger = logging.getLogger(__name__)

STRATEGY = "reference_loss"
FOLDER, LOSSES = "reference", "losses.json"


def is_wanted(mixing: MixingConfig) -> bool:
    """Whether the strategy needs reference losses that the recipe does not give."""
    return mixing.strategy == STRATEGY and mixing.options.get("references") is None


def reference_recipe(run: RunConfig) -> RunConfig:
    """The recipe of the reference run: the same but for weights, length and place.

    Raises:
        UserError: the run has no place for it.
    """
    if not run.checkpoint.save:
        raise UserError(
            f"mixing strategy {STRATEGY} first makes a run with uniform weights, and there is no "
            "place for it",
            "set save, or give the losses with the option references",
        )
    reference = copy.deepcopy(run)
    reference.mixing = MixingConfig(strategy="uniform")
    reference.checkpoint.save = str(Path(run.checkpoint.save) / FOLDER)
    if run.logging.wandb_name:
        reference.logging.wandb_name = f"{run.logging.wandb_name}-{FOLDER}"
    steps = run.mixing.options.get("reference_iters")
    if steps is not None:
        reference.training.train_iters = whole("reference_iters", steps, 1)
    return reference


def add_references(run: RunConfig, grid: Grid) -> bool:
    """Give the recipe the reference losses, after the run that they need (collective).

    Returns:
        False: that run was told to stop before its end.
    """
    reference = reference_recipe(run)
    assert reference.checkpoint.save
    file = Path(reference.checkpoint.save) / LOSSES
    # One rank looks: a shared file system may show others the file later.
    found = [json.loads(file.read_text()) if grid.is_main and file.is_file() else None]
    if grid.world_size > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    losses = found[0]
    if losses is None:
        start = time.monotonic()
        logger.info("first the reference run with uniform weights, in %s", file.parent)
        losses = _make(reference, grid, run.mixing.options)
        gc.collect()  # its model, before the next is made
        if losses is None:
            return False
        if grid.is_main:
            write_text(file, json.dumps(losses, indent=2) + "\n")
        if run.training.exit_duration_minutes is not None:
            run.training.exit_duration_minutes -= (time.monotonic() - start) / 60
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    logger.info("reference losses: %s", shown)
    run.mixing.options = {**run.mixing.options, "references": losses}
    return True


def _make(run: RunConfig, grid: Grid, options: dict[str, Any]) -> dict[str, float] | None:
    """Held-out losses at the end of the run; none if it was told to stop.

    Args:
        run: the recipe of the reference run.
        options: of the strategy that comes after it.
    """
    data = open_data(run, grid.data_rank, grid.data_size, read_tokens=grid.reads_tokens)
    if blind := [name for name in data.names if name not in data.valid]:
        raise UserError(
            f"mixing strategy {STRATEGY} compares held-out losses, and {', '.join(blind)} has no "
            "held-out samples",
            "set valid_path, or take another strategy",
        )
    # What is wrong with the strategy is better known now than after the reference run.
    make_strategy(STRATEGY, data.names, {**options, "references": dict.fromkeys(data.names, 0.0)})
    write_recipe(run, run.checkpoint.save, grid.is_main)
    trainer = Trainer(run, grid, data)
    trainer.load()
    return None if trainer.fit() else trainer.evaluate()
