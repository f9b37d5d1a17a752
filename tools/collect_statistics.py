"""What a dense model does on your text, for the constructions that look at data.

    python tools/collect_statistics.py --load DENSE --data-dir DATA --output statistics
    torchrun --nproc-per-node 8 tools/collect_statistics.py --tensor-model-parallel-size 2 ...

DENSE is written by `tools/convert_llama.py import`, DATA by tools/preprocess_data.py. Forward and
backward passes, no training. Interrupted? Start it again: it goes on, on any grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.errors import UserError, hide_known_warnings, run_main


@dataclass
class Options:
    """Importance of every FFN neuron for every group of text, and samples of what FFNs read."""

    load: Path
    """Checkpoint of the dense model."""
    data_dir: Path
    """Folder of tokenised domains."""
    output: Path
    """Directory of the statistics."""
    task: Literal["pretrain", "sft"] = "pretrain"
    """Text, or conversations (tools/preprocess_data.py --task sft): their trained tokens count."""
    groups: Literal["domains", "hidden", "sentence", "centroids"] = "domains"
    """Groups of text: the domains; clusters of samples by their mean last hidden state or by
    sentence embeddings; or clusters of tokens by each layer's FFN inputs (LLaMA-MoE v2).
    """
    num_clusters: int = 8
    """Clusters C (experts that will be made); not used for domains."""
    num_samples: int = 64
    """Samples of each domain."""
    num_inputs: int = 4096
    """Tokens whose FFN inputs are kept, in every layer; 0: none."""
    skip_gradients: bool = False
    """Forward passes only: no importance."""
    sentence_model: Path | None = None
    """Directory of a sentence-transformers model (groups=sentence)."""
    seq_length: int = 2048
    """Tokens in a sample."""
    micro_batch_size: int = 1
    """Samples in a forward pass of a rank."""
    save_interval: int = 64
    """Samples between savings of what was summed up."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers."""
    seed: int = 1234
    """Of the kept tokens and of k-means."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with CUDA, fp32 on CPU."""

    def validate(self) -> None:
        """Raise a UserError for the first option that cannot work."""
        for name in ("num_clusters", "num_samples", "seq_length", "save_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_inputs", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.groups == "centroids" and self.num_inputs < self.num_clusters:
            raise UserError(
                f"num_inputs={self.num_inputs} tokens cannot make {self.num_clusters} clusters",
                "keep more inputs: hundreds for each cluster",
            )


def main() -> int:
    import tyro

    hide_known_warnings()
    collect(tyro.cli(Options, description=__doc__))
    return 0


def collect(options: Options) -> None:
    """Collect on this rank.

    Raises:
        UserError: before any work, and before any process group, where an option cannot work.
    """
    options.validate()

    from megatron_ext.checkpoint import experts
    from megatron_ext.checkpoint.reader import CheckpointWeights
    from megatron_ext.config import (
        CheckpointConfig,
        DataConfig,
        ParallelConfig,
        RunConfig,
        TrainingConfig,
    )
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import find_domains, open_stream
    from megatron_ext.training.samples import SamplePool, check_sentence_model
    from megatron_ext.training.unfinished import Settings, check_output
    from megatron_ext.validation import data_parallel_size

    weights = CheckpointWeights(options.load)
    if weights.model.is_moe:
        raise UserError(f"{options.load} has experts", "statistics are of a dense model")
    if options.groups == "sentence":
        check_sentence_model(options.sentence_model)
    run = RunConfig(
        model=weights.model,
        parallel=ParallelConfig(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        ),
        data=DataConfig(
            data_dir=str(options.data_dir), seq_length=options.seq_length, task=options.task
        ),
        training=TrainingConfig(
            micro_batch_size=options.micro_batch_size,
            seed=options.seed,
            device=options.device,
            precision=options.precision,
            # Hooks want the norm apart from the matrix that follows it.
            transformer_impl="local",
        ),
        checkpoint=CheckpointConfig(load=str(options.load)),
    )
    data_size = data_parallel_size(run.parallel, grids.world_size_of_environment())
    run.training.global_batch_size = options.micro_batch_size * data_size
    streams = {
        name: open_stream(run, name, domain.path) for name, domain in find_domains(run.data).items()
    }
    pool = SamplePool(
        streams, options.num_samples, options.seq_length, options.num_inputs, options.seed
    )
    if options.groups in ("hidden", "sentence") and pool.size < options.num_clusters:
        raise UserError(
            f"{pool.size} samples cannot make num_clusters={options.num_clusters} clusters",
            "read more samples, or make fewer clusters",
        )

    settings = Settings(
        model=experts.fingerprint(weights),
        domains={name: stream.num_tokens for name, stream in streams.items()},
        task=options.task,
        groups=options.groups,
        num_clusters=options.num_clusters,
        num_samples=options.num_samples,
        num_inputs=options.num_inputs,
        seq_length=options.seq_length,
        gradients=not options.skip_gradients,
        save_interval=options.save_interval,
        seed=options.seed,
    )
    check_output(options.output, settings)
    grid = grids.initialize(run)

    from megatron_ext.training.collect import Collector, load_frozen

    model = load_frozen(run, grid)
    collector = Collector(run, grid, model, pool, settings, options.output, options.sentence_model)
    loss = collector.collect()
    if grid.is_main:
        print(f"{pool.size} samples of {options.seq_length} tokens, loss {loss:.4f}")
        print(f"done: {options.output}")
    grids.close()


if __name__ == "__main__":
    run_main(main)
