"""Continue the pre-training of a LLaMA-MoE (or of a dense LLaMA) on blended domains.

On a laptop: python pretrain_moe.py --load MOE --data-dir DATA --save RUN --seq-length 256

On a node: torchrun --nproc-per-node 8 pretrain_moe.py --config recipe.yaml
"""

from megatron_ext.errors import run_main


def main() -> int:
    from megatron_ext.recipe import parse_run

    run = parse_run(description=__doc__ or "")

    from megatron_ext.training import grid as grids

    grid = grids.initialize(run)

    from megatron_ext.checkpoint.run_state import check_model
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer, write_recipe

    source = run.checkpoint.load or run.checkpoint.save
    if source:
        check_model(source, run.model)
    data = open_data(run, grid.data_rank, grid.data_size, read_tokens=grid.reads_tokens)
    write_recipe(run, run.checkpoint.save, grid.is_main)
    trainer = Trainer(run, grid, data)
    trainer.load()
    trainer.fit()
    grids.close()
    return 0


if __name__ == "__main__":
    run_main(main)
