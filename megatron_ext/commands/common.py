"""What every conversion is told, and what it leaves beside the weights.

Heavy imports are inside the functions of this package: --help and mistakes answer at once, and
processes that megatron-core spawns import it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.tensors import Weights


@dataclass(kw_only=True)
class Conversion:
    """Options of everything that writes a checkpoint."""

    output: Path
    """Directory of the new checkpoint."""
    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Type of the stored weights."""
    tokenizer: Path | None = None
    """Directory of the tokenizer's files; none: the source's own."""
    force: bool = False
    """Replace a model that is in the output directory."""

    def write(self, folder: Path, source: Path, weights: Weights) -> None:
        """Everything of a checkpoint directory but construction.json."""
        from megatron_ext.checkpoint import layout
        from megatron_ext.checkpoint.tensors import DTYPES
        from megatron_ext.checkpoint.writer import write_weights

        layout.write_model_config(folder, weights.model)
        write_tokenizer(source, self.tokenizer, folder / layout.TOKENIZER_DIR)
        dtype = DTYPES.get(self.dtype)
        title = f"writing {self.output.name}"
        write_weights(layout.iteration_dir(folder, 0), weights, dtype, title)
        layout.write_latest(folder, 0)


def check_paths(source: Path, output: Path, force: bool) -> None:
    """Raise a UserError where the source is missing or the output would be written over."""
    from megatron_ext.checkpoint.layout import check_output

    if not source.exists():
        raise UserError(f"source {source} does not exist")
    if output.resolve() == source.resolve():
        raise UserError("source and output are the same directory", "name another output")
    check_output(output, force)


def write_tokenizer(source: Path, chosen: Path | None, target: Path) -> None:
    """Keep tokenizer and generation settings beside the weights."""
    from megatron_ext.checkpoint import layout

    own = source / layout.TOKENIZER_DIR
    place = chosen or (own if own.is_dir() else source)
    if place.is_dir():
        copied = layout.copy_tokenizer(place, target)
        if chosen and not any(name.startswith("tokenizer") for name in copied):
            raise UserError(f"{chosen} holds no tokenizer files")
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name).save_pretrained(target)
    if not (target / layout.GENERATION_FILE).is_file():
        settings = _token_ids(source)
        layout.write_text(target / layout.GENERATION_FILE, json.dumps(settings, indent=2) + "\n")


def _token_ids(source: Path) -> dict[str, Any]:
    """Begin, end and padding tokens as the source's configuration names them."""
    from megatron_ext.checkpoint.sources import GgufSource, read_hf_config

    if (source / "config.json").is_file():
        config = read_hf_config(source)
    elif source.is_file():
        config = GgufSource(source).config
    else:
        config = {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}
