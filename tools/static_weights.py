"""Static blend weights: in proportion to how far each data set is from the others.

    python tools/static_weights.py --by gate_load --output weights.jsonl \
        --load MOE --data-dir TALKS --task sft --seq-length 512
    python finetune_moe.py ... with mixing: {strategy: static, options: {initial: weights.jsonl}}

Takes the options of pretrain_moe.py too, for any grid (hidden states: data and expert parallelism);
held-out samples are read, nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.errors import UserError, run_main


@dataclass
class Options:
    by: Literal["gate_load", "embedding"]
    """Loads of the routers, or what the texts say."""
    output: Path
    """Weights log to write (.jsonl); option `initial` of every strategy reads it."""
    sentence_model: Path | None = None
    """(embedding) Directory of a sentence-transformers model; none: the model's own last hidden
    states.
    """


def main() -> int:
    import json

    import tyro

    from megatron_ext.config import MixingConfig
    from megatron_ext.recipe import parse_run

    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    if options.output.suffix != ".jsonl":
        raise UserError(f"output {options.output} does not end in .jsonl")
    run = parse_run(rest, description=__doc__ or "")
    if not run.checkpoint.load:
        raise UserError("no checkpoint", "name a converted checkpoint or a run with --load")
    run.mixing = MixingConfig(layers=run.mixing.layers, probe_samples=run.mixing.probe_samples)
    run.checkpoint.save = None  # read, and only its weights

    from megatron_ext.training import static_weights

    static_weights.check(run, options.by, options.sentence_model)

    from megatron_ext.checkpoint.layout import write_text
    from megatron_ext.checkpoint.run_state import check_model
    from megatron_ext.mixing.strategies.distances import distance_weights
    from megatron_ext.training import grid as grids
    from megatron_ext.training.collect import load_frozen
    from megatron_ext.training.data import open_data
    from megatron_ext.training.passes import Passes

    grid = grids.initialize(run)
    check_model(run.checkpoint.load, run.model)
    data = open_data(run, grid.data_rank, grid.data_size, read_tokens=grid.reads_tokens)
    if blind := [name for name in data.names if name not in data.valid]:
        raise UserError(f"{', '.join(blind)} has no held-out samples", "set valid_path")
    if options.by == "embedding" and options.sentence_model is not None:
        features = static_weights.sentences(run, data, options.sentence_model)
    else:
        passes = Passes(run, grid, [load_frozen(run, grid)], len(data.names))
        by_loads = options.by == "gate_load"
        measure = static_weights.gate_loads if by_loads else static_weights.hidden_states
        features = measure(passes, data)
    data.loader.close()
    weights = dict(zip(data.names, distance_weights(features).tolist(), strict=True))
    if grid.is_main:
        entry = {"step": 0, "weights": weights, "reason": options.by, "automatic": False}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(entry) + "\n")
        print("\n".join(f"{name:24} {weight:.4f}" for name, weight in weights.items()))
        print(f"done: {options.output}")
    grids.close()
    return 0


if __name__ == "__main__":
    run_main(main)
