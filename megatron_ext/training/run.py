"""The story of a run, from a recipe to its last checkpoint."""

from __future__ import annotations

from megatron_ext.config import RunConfig
from megatron_ext.training import grid as grids


def train(run: RunConfig) -> None:
    """Train as the recipe says, on every rank that torchrun started (collective).

    Raises:
        UserError: before work starts, for what cannot be; in a step, for a loss that is not finite.
    """
    grid = grids.initialize(run)
    # megatron-core takes seconds to import: not for a recipe that has just been refused, and not
    # before `platform.setup`.
    from megatron_ext.checkpoint.run_state import check_model
    from megatron_ext.training import reference
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer, write_recipe

    source = run.checkpoint.load or run.checkpoint.save
    if source:
        check_model(source, run.model)
    if not reference.is_wanted(run.mixing) or reference.add_references(run, grid):
        data = open_data(run, grid.data_rank, grid.data_size, read_tokens=grid.reads_tokens)
        write_recipe(run, run.checkpoint.save, grid.is_main)
        trainer = Trainer(run, grid, data)
        trainer.load()
        trainer.fit()
    grids.close()
