"""What a construction did to a dense model, in figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.tensors import Weights

NUM_INPUTS = 1024


@dataclass(kw_only=True)
class Report:
    """Write report.json, report.md and report.png beside a mixture: how far its experts are from
    the dense FFNs, layer by layer.
    """

    source: Path
    """Checkpoint of the mixture, or run that started from one."""
    dense: Path
    """What it was made of: Hugging Face directory, GGUF file, or dense checkpoint."""
    statistics: Path | None = None
    """Directory of tools/collect_statistics.py with sampled inputs; none: only what needs none."""
    num_inputs: int = NUM_INPUTS
    """Sampled inputs that are used in each layer."""
    dense_losses: Path | None = None
    """Output of tools/evaluate.py for the dense model."""
    losses: Path | None = None
    """The same for the mixture."""
    iteration: int | None = None
    """Iteration of a run; none: the latest."""
    output: Path | None = None
    """Directory of the report; none: the mixture's."""

    def run(self) -> None:
        if (self.dense_losses is None) != (self.losses is None):
            raise UserError(
                "perplexity before and after takes two files",
                "give both --dense-losses and --losses",
            )
        if self.num_inputs < 1:
            raise UserError(f"num_inputs={self.num_inputs} must be at least 1")

        from megatron_ext.checkpoint import construction_report
        from megatron_ext.checkpoint.hf import open_weights
        from megatron_ext.checkpoint.reader import CheckpointWeights
        from megatron_ext.construction.statistics import Statistics

        perplexity = None
        if self.dense_losses is not None and self.losses is not None:
            perplexity = construction_report.read_perplexity(self.dense_losses, self.losses)
        values = construction_report.collect(
            CheckpointWeights(self.source, self.iteration),
            open_weights(self.dense),
            Statistics.open(self.statistics) if self.statistics is not None else None,
            self.num_inputs,
            perplexity,
        )
        folder = self.output or self.source
        construction_report.write(folder, values)
        print(f"done: {folder / construction_report.NAME}.md")


def write_report(folder: Path, dense: Weights, statistics: Path | None) -> None:
    """The report of a mixture that was just made: with measurements where there are inputs."""
    from megatron_ext.checkpoint import construction_report
    from megatron_ext.checkpoint.reader import CheckpointWeights
    from megatron_ext.construction.statistics import Statistics

    opened = Statistics.open(statistics) if statistics is not None else None
    values = construction_report.collect(CheckpointWeights(folder), dense, opened, NUM_INPUTS)
    construction_report.write(folder, values)
