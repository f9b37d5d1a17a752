"""A mixture's score scale, layer by layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError


@dataclass(kw_only=True)
class Scale:
    """Estimate a score scale for each layer on a text, and set it in a mixture's model.yaml."""

    dense: Path
    """What the mixture was made of: Hugging Face directory, GGUF file, or dense checkpoint."""
    moe: Path
    """Checkpoint of the mixture; its weights stay as they are."""
    data_dir: Path
    """Folder of tokenised domains."""
    num_samples: int = 8
    """Samples of each domain; their hidden states are in memory, and one model at a time."""
    seq_length: int = 2048
    """Tokens in a sample."""
    dry_run: bool = False
    """Print the scales only."""

    def run(self) -> None:
        from megatron_ext.checkpoint import experts, layout, verify
        from megatron_ext.checkpoint.hf import open_weights
        from megatron_ext.checkpoint.reader import CheckpointWeights
        from megatron_ext.construction import score_scale

        for name in ("num_samples", "seq_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        dense, moe = open_weights(self.dense), CheckpointWeights(self.moe)
        if dense.model.is_moe or not moe.model.is_moe:
            raise UserError(
                "a score scale takes a dense model and a mixture",
                "--dense names the one, --moe the other",
            )
        source = (layout.read_construction(self.moe) or {}).get("source", {})
        made_of = source.get("fingerprint")
        if made_of is not None and made_of != experts.fingerprint(dense):
            raise UserError(
                f"{self.moe} was not made of {self.dense}", f"it was made of {source.get('name')}"
            )
        batches = self._batches()
        targets = score_scale.loudness(verify.fill(verify.build_model(dense.model), dense), batches)
        mixture = verify.load(verify.build_model(moe.model), moe.folder)
        scales = score_scale.scales(mixture, batches, targets)
        print(f"{'layer':>5} {'before':>8} {'score scale':>12}")
        for layer in moe.model.moe_layers:
            print(f"{layer:>5} {moe.model.score_scale(layer):>8.4g} {scales[layer]:>12.4f}")
        if not self.dry_run:
            model = dataclasses.replace(moe.model, moe_score_scale=scales)
            layout.write_model_config(self.moe, model)
            print(f"done: {self.moe / layout.MODEL_FILE}")

    def _batches(self) -> list[dict]:
        from megatron_ext.config import DataConfig
        from megatron_ext.data.loader import validation_batches
        from megatron_ext.data.stream import TokenStream
        from megatron_ext.training.data import find_domains

        batches: list[dict] = []
        for name, domain in find_domains(DataConfig(data_dir=str(self.data_dir))).items():
            stream = TokenStream(domain.path, self.seq_length, 0, name)
            count = min(self.num_samples, stream.num_samples)
            batches += validation_batches(stream, count, 1, 0, 1)
        return batches
