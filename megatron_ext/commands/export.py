"""A checkpoint as a Hugging Face directory that needs no custom code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.commands.common import check_paths


@dataclass
class Export:
    """Turn a checkpoint or run into a Hugging Face directory that needs no custom code."""

    source: Path
    """Checkpoint or run directory."""
    output: Path
    """Directory of the Hugging Face model."""
    iteration: int | None = None
    """Iteration of a run; none: the latest."""
    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Type of the exported weights."""
    max_shard_size: float = 2.0
    """Largest weight file in GB; one file is in memory at a time."""
    tokenizer: Path | None = None
    """Directory of the tokenizer's files; none: those of the checkpoint."""
    force: bool = False
    """Replace a model that is in the output directory."""
    skip_verify: bool = False
    """Do not compare with transformers' model (which takes the memory of two fp32 models)."""

    def run(self) -> None:
        from megatron_ext.checkpoint import export, layout, verify
        from megatron_ext.checkpoint.reader import CheckpointWeights
        from megatron_ext.checkpoint.tensors import DTYPES

        check_paths(self.source, self.output, self.force)
        checkpoint = CheckpointWeights(self.source, self.iteration)
        export.architecture(checkpoint.model)
        dtype = DTYPES.get(self.dtype, checkpoint.dtype)
        tokenizer = self.tokenizer or self.source / layout.TOKENIZER_DIR
        with layout.staged_directory(self.output, self.force) as folder:
            copied = layout.copy_tokenizer(tokenizer, folder)
            settings = folder / layout.GENERATION_FILE
            token_ids = json.loads(settings.read_text()) if settings.is_file() else {}
            export.export(checkpoint, folder, dtype, int(self.max_shard_size * 1e9), token_ids)
            if not any(name.startswith("tokenizer") for name in copied):
                print(f"no tokenizer in {tokenizer}: add its files, or name a --tokenizer")
            if not self.skip_verify:
                error = verify.check_export(checkpoint, folder, dtype)
                print(f"transformers' logits against the checkpoint: relative error {error:.1e}")
        print(f"done: {self.output}")
