"""A mixture of full-width experts as a dense model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.commands.common import Conversion, check_paths
from megatron_ext.errors import UserError


@dataclass(kw_only=True)
class Merge(Conversion):
    """Add a mixture's experts up to one FFN: a dense checkpoint, as XFT does after training."""

    source: Path
    """Checkpoint or run whose experts are as wide as the dense FFN was."""
    iteration: int | None = None
    """Iteration of a run; none: the latest."""
    shared_weight: float | None = None
    """Weight lambda of the shared expert (XFT's release: 0.75); none: 0.75 if there is one."""
    coefficients: Path | None = None
    """JSON file, a list for every MoE layer of one number per expert, whose softmax shares out the
    rest; none: equally.
    """
    skip_verify: bool = False
    """Do not compare with the mixture (which takes the memory of the fp32 mixture)."""

    def run(self) -> None:
        from megatron_ext.checkpoint import layout, verify
        from megatron_ext.checkpoint.lora import full_experts
        from megatron_ext.checkpoint.reader import CheckpointWeights
        from megatron_ext.checkpoint.upcycled import MergedWeights

        check_paths(self.source, self.output, self.force)
        experts = CheckpointWeights(self.source, self.iteration)
        shared = self.shared_weight
        if shared is None and experts.model.moe_shared_expert_intermediate_size:
            shared = 0.75
        merged = MergedWeights(full_experts(experts), shared, self._coefficients())
        job = layout.describe_job(self)
        with layout.staged_directory(self.output, self.force, job) as folder:
            self.write(folder, self.source, merged)
            if not self.skip_verify:
                error = verify.compare(experts, CheckpointWeights(folder))
                print(f"dense logits against the mixture's: they differ by {error:.1e}")
        print(f"done: {self.output}")

    def _coefficients(self) -> list[list[float]] | None:
        if self.coefficients is None:
            return None
        try:
            rows = json.loads(self.coefficients.read_text())
            return [[float(value) for value in row] for row in rows]
        except FileNotFoundError:
            raise UserError(f"coefficients {self.coefficients} does not exist") from None
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.coefficients} is not a JSON list of lists of numbers ({error})",
                "write one list for every MoE layer",
            ) from None
