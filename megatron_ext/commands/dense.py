"""A dense LLaMA as a checkpoint that any grid loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.commands.common import Conversion, check_paths
from megatron_ext.errors import UserError


@dataclass(kw_only=True)
class Import(Conversion):
    """Turn a dense LLaMA into a checkpoint that is loaded on any grid."""

    source: Path
    """Hugging Face directory with safetensors, or GGUF file."""
    skip_verify: bool = False
    """Do not compare with transformers' model (which takes the memory of two fp32 models)."""

    def run(self) -> None:
        from megatron_ext.checkpoint import layout, verify
        from megatron_ext.checkpoint.hf import HfWeights, open_weights

        check_paths(self.source, self.output, self.force)
        weights = open_weights(self.source)
        if not isinstance(weights, HfWeights):
            raise UserError(f"{self.source} is a checkpoint already")
        with layout.staged_directory(self.output, self.force, layout.describe_job(self)) as folder:
            self.write(folder, self.source, weights)
            if not self.skip_verify:
                error = verify.check_import(self.source, folder)
                print(f"logits against transformers: relative error {error:.1e}")
        print(f"done: {self.output}")
