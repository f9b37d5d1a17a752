"""Train the routers of a mixture on a little data, sorted by which expert predicts it best (UpIT).

    python tools/initialise_router.py --load MOE --data-dir DATA --save ROUTED --task sft
    torchrun --nproc-per-node 8 tools/initialise_router.py --expert-model-parallel-size 8 ...

MOE is a checkpoint whose experts are whole FFNs (convert_llama.py upit or upcycle), DATA is written
by tools/preprocess_data.py. ROUTED is a new checkpoint, and router_init.json in it says what was
done: buckets, perplexities, and how often the routers choose a bucket's expert for it. Interrupted?
Start it again: it goes on after the last pass over the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.errors import UserError, hide_known_warnings, run_main

if TYPE_CHECKING:
    from megatron_ext.config import ModelConfig, RunConfig

LR_TIMES_WIDTH = 0.4
"""Measured (docs/upit.md)."""


@dataclass
class Options:
    """Router pre-optimisation: routing vectors trained on buckets of seed data."""

    load: Path
    """Checkpoint of the mixture; it is not changed."""
    data_dir: Path
    """Folder of tokenised domains."""
    save: Path
    """Directory of the new checkpoint."""
    task: Literal["pretrain", "sft"] = "sft"
    """Text, or conversations (tools/preprocess_data.py --task sft)."""
    seed_fraction: float = 0.01
    """Part of all training samples (conversations, or seq_length tokens of text) that is read."""
    held_out: float = 0.2
    """Part of every bucket that is measured on and not trained on."""
    buckets: Literal["perplexity", "random"] = "perplexity"
    """A sample is for the expert that predicts it best, or for any (the ablation)."""
    capacity: float = 1.0
    """Buckets hold between 1/c and c times an even share of the samples; 0: any number."""
    epochs: int = 4
    """Passes over the seed data; 0: measure only."""
    lr: float | None = None
    """Of Adam, with a cosine down to 0; none: 0.4 / hidden_size, with which a step moves a logit as
    far in a model of any width.
    """
    lm_weight: float = 0.5
    """a of the loss: a LM + (1 - a) binary."""
    negatives: Literal["others", "none"] = "others"
    """Whether an expert's vector is told of the other buckets' tokens too (weighing as much in all
    as its own), or of its own only, as in the paper.
    """
    gate: Literal["straight_through", "sigmoid"] = "straight_through"
    """What an expert's output is multiplied by in training: 1, with the gradient of sigmoid(h . r);
    or the sigmoid itself.
    """
    seq_length: int = 2048
    """Tokens in a row."""
    packing: Literal["packed", "padded"] = "packed"
    """(sft) As many conversations in a row as fit, or one."""
    micro_batch_size: int = 1
    """Rows in a forward pass of a rank."""
    global_batch_size: int = 8
    """Rows in a step."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each attention matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; none: 1."""
    seed: int = 1234
    """Of everything that is drawn."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with CUDA, fp32 on CPU. Routing vectors are trained in fp32."""
    force: bool = False
    """Replace a model that is in the output directory, and what another job left unfinished."""

    def validate(self) -> None:
        """Raise a UserError for the first option that cannot work."""
        for name, low, high in (
            ("seed_fraction", 0.0, 1.0),
            ("held_out", 0.0, 0.9),
            ("lm_weight", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}={getattr(self, name)} must lie in {low:g} to {high:g}")
        for name in ("epochs", "lr", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.capacity and self.capacity < 1:
            raise UserError(
                f"capacity={self.capacity} leaves no room for all samples",
                "give 1 for even buckets, more for uneven ones, 0 for any",
            )

    def recorded(self) -> dict[str, Any]:
        """What decides on the result, for the report."""
        names = (
            *("seed_fraction", "held_out", "buckets", "capacity", "epochs", "lr", "lm_weight"),
            *("negatives", "gate", "seq_length", "global_batch_size", "seed"),
        )
        return {name: getattr(self, name) for name in names}


def check_mixture(load: Path, model: ModelConfig) -> None:
    """Raise a UserError where an expert alone is not a dense model, or has no routing vector."""
    if not model.is_moe:
        raise UserError(
            f"{load} is a dense model", "make a mixture of it first (tools/convert_llama.py)"
        )
    if model.moe_gate != "linear":
        raise UserError(
            f"moe_gate={model.moe_gate} has no routing vectors", "convert with --moe-gate linear"
        )
    shared = model.moe_shared_expert_intermediate_size
    if model.expert_width != model.ffn_hidden_size or shared:
        beside = f" beside a shared one of {shared}" if shared else ""
        raise UserError(
            f"an expert of {load} is {model.expert_width} wide{beside}, a dense FFN "
            f"{model.ffn_hidden_size}: no expert can be asked alone",
            "this is for experts that are whole FFNs (convert_llama.py upit, upcycle)",
        )


def main() -> int:
    import tyro

    hide_known_warnings()
    initialise(tyro.cli(Options, description=__doc__))
    return 0


def initialise(options: Options) -> None:
    """Everything, on this rank (collective).

    Raises:
        UserError: before any work, and before any process group, where an option cannot work.
    """
    options.validate()

    from megatron_ext.checkpoint import layout
    from megatron_ext.checkpoint.reader import CheckpointWeights
    from megatron_ext.checkpoint.rerouted import write_rerouted
    from megatron_ext.commands.common import check_paths
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import find_domains, open_stream
    from megatron_ext.training.router_progress import RouterProgress
    from megatron_ext.training.seeds import SeedSamples
    from megatron_ext.validation import check_vocabulary, validate

    check_paths(options.load, options.save, options.force)
    weights = CheckpointWeights(options.load)
    check_mixture(options.load, weights.model)
    run = recipe(options, weights.model)
    validate(run, grids.world_size_of_environment())
    streams = {
        name: open_stream(run, name, domain.path) for name, domain in find_domains(run.data).items()
    }
    seeds = SeedSamples(
        streams, options.seed_fraction, options.seq_length, options.packing, options.seed
    )
    assert weights.model.num_experts is not None
    if seeds.size < weights.model.num_experts:
        raise UserError(
            f"seed_fraction={options.seed_fraction} of {seeds.available} samples is {seeds.size}, "
            f"fewer than the {weights.model.num_experts} experts",
            "raise seed_fraction",
        )
    check_vocabulary(seeds.largest_token(), weights.model.vocab_size)
    progress = RouterProgress(options.save, layout.describe_job(options), options.force)
    grid = grids.initialize(run)

    from megatron_ext.training.collect import load_frozen
    from megatron_ext.training.router_init import RouterInitialiser, Training
    from megatron_ext.training.router_report import optimise, table

    training = Training(
        options.epochs,
        LR_TIMES_WIDTH / weights.model.hidden_size if options.lr is None else options.lr,
        options.lm_weight,
        options.negatives,
        options.gate,
        options.seed,
    )
    if grid.is_main and progress.passes:
        print(f"going on with {progress.file}: {progress.passes} passes are done")
    initialiser = RouterInitialiser(run, grid, load_frozen(run, grid), seeds, progress)
    found = optimise(initialiser, options.buckets, options.capacity, options.held_out, training)
    vectors = initialiser.all_vectors()
    grids.close()
    if grid.is_main:
        print(table(found))
        report = {"options": {**options.recorded(), "lr": training.lr}, **found}
        write_rerouted(weights, options.save, vectors, report, options.force)
        progress.remove()
        print(f"done: {options.save}")


def recipe(options: Options, model: ModelConfig) -> RunConfig:
    """What builds the grid, the model and the data; conversations one by one."""
    from megatron_ext.config import (
        CheckpointConfig,
        DataConfig,
        ParallelConfig,
        RunConfig,
        TrainingConfig,
    )

    return RunConfig(
        model=model,
        parallel=ParallelConfig(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
            context_parallel_size=options.context_parallel_size,
            expert_model_parallel_size=options.expert_model_parallel_size,
            expert_tensor_parallel_size=options.expert_tensor_parallel_size,
        ),
        data=DataConfig(
            data_dir=str(options.data_dir),
            seq_length=options.seq_length,
            task=options.task,
            packing="padded",
        ),
        training=TrainingConfig(
            micro_batch_size=options.micro_batch_size,
            global_batch_size=options.global_batch_size,
            seed=options.seed,
            device=options.device,
            precision=options.precision,
        ),
        checkpoint=CheckpointConfig(load=str(options.load)),
    )


if __name__ == "__main__":
    run_main(main)
