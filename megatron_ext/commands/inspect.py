"""What a model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Inspect:
    """Show what a model is made of."""

    source: Path
    """Checkpoint, run, Hugging Face directory or GGUF file."""

    def run(self) -> None:
        from megatron_ext.checkpoint.hf import open_weights
        from megatron_ext.checkpoint.inspection import report

        print(report(self.source, open_weights(self.source)))
