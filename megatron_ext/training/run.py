"""The story of a run, from a recipe to its last checkpoint."""

from __future__ import annotations

from megatron_ext.checkpoint.run_state import check_model
from megatron_ext.config import RunConfig
from megatron_ext.training import grid as grids
from megatron_ext.training.data import open_data
from megatron_ext.training.trainer import Trainer, write_recipe


def train(run: RunConfig) -> None:
    """Train as the recipe says, on every rank that torchrun started (collective).

    Raises:
        UserError: before work starts, for what cannot be; in a step, for a loss that is not finite.
    """
    grid = grids.initialize(run)
    source = run.checkpoint.load or run.checkpoint.save
    if source:
        check_model(source, run.model)
    data = open_data(run, grid.data_rank, grid.data_size, read_tokens=grid.reads_tokens)
    write_recipe(run, run.checkpoint.save, grid.is_main)
    trainer = Trainer(run, grid, data)
    trainer.load()
    trainer.fit()
    grids.close()
