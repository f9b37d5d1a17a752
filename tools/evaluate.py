"""Held-out loss of every domain of a data set, as JSON on standard output.

    python tools/evaluate.py --load MOE --data-dir DATA --seq-length 256 > losses.json
    torchrun --nproc-per-node 8 tools/evaluate.py --config recipe.yaml --load RUN > losses.json

Takes the options of pretrain_moe.py, for any grid; nothing is trained or saved.
"""

from megatron_ext.errors import UserError, run_main


def main() -> int:
    import json
    import math

    from tqdm import tqdm

    from megatron_ext.recipe import parse_run

    run = parse_run(description=__doc__ or "")
    if not run.checkpoint.load:
        raise UserError("no checkpoint", "name a converted checkpoint or a run with --load")
    run.checkpoint.save, run.checkpoint.finetune = None, True  # read, and only its weights
    run.mixing = type(run.mixing)()  # what the blend would follow does not matter here

    from megatron_ext.training import grid as grids

    grid = grids.initialize(run)

    from megatron_ext.checkpoint.run_state import check_model
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer

    check_model(run.checkpoint.load, run.model)
    data = open_data(run, grid.data_rank, grid.data_size, read_tokens=grid.reads_tokens)
    if not data.valid:
        raise UserError("no domain has held-out samples", "set valid_path, or see preprocess_data")
    trainer = Trainer(run, grid, data)
    trainer.load()
    streams = data.valid
    losses: dict[str, float] = {}
    for name in tqdm(streams, desc="evaluating", unit="domain", disable=not grid.is_main):
        data.valid = {name: streams[name]}
        losses |= trainer.evaluate()
    data.loader.close()
    if grid.is_main:
        perplexity = {name: math.exp(min(loss, 50)) for name, loss in losses.items()}
        result = {"load": run.checkpoint.load, "loss": losses, "perplexity": perplexity}
        print(json.dumps(result, indent=2))
    grids.close()
    return 0


if __name__ == "__main__":
    run_main(main)
