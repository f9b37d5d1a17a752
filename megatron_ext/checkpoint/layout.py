"""Where things lie in a checkpoint directory: the same for converted checkpoints and for runs.

    DIR/model.yaml                          the ModelConfig
    DIR/latest_checkpointed_iteration.txt   number of the newest complete iteration
    DIR/iter_0000000/                       weights, as megatron-core's torch_dist
    DIR/construction.json                   how the experts were made (not in a dense import)
    DIR/tokenizer/                          tokenizer and generation settings, for export

Imports nothing heavy: the command line reads model.yaml before it knows what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.recipe import from_dict, to_dict

MODEL_FILE = "model.yaml"
LATEST_FILE = "latest_checkpointed_iteration.txt"
CONSTRUCTION_FILE = "construction.json"
TOKENIZER_DIR = "tokenizer"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)
PathLike = str | os.PathLike[str]


def find_model_config(path: PathLike) -> dict[str, Any] | None:
    """The `model.yaml` of a checkpoint or run as plain values; None where there is none."""
    file = Path(path) / MODEL_FILE
    if not file.is_file():
        return None
    values = yaml.safe_load(file.read_text())
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a mapping of model options")
    return values


def read_model_config(path: PathLike) -> ModelConfig:
    """The ModelConfig of a checkpoint or run directory.

    Raises:
        UserError: there is none, or it holds what this version does not know.
    """
    values = find_model_config(path)
    if values is None:
        raise UserError(
            f"{path} is not a checkpoint: it has no {MODEL_FILE}",
            "make one with tools/convert_llama.py import or partition",
        )
    model: ModelConfig = from_dict(ModelConfig, values, str(Path(path) / MODEL_FILE))
    return model


def write_model_config(path: PathLike, model: ModelConfig) -> None:
    """Write `model.yaml` into a directory."""
    write_text(Path(path) / MODEL_FILE, yaml.safe_dump(to_dict(model), sort_keys=False))


def iteration_dir(path: PathLike, iteration: int) -> Path:
    """Where the weights of an iteration lie."""
    return Path(path) / f"iter_{iteration:07d}"


def latest_iteration(path: PathLike) -> int | None:
    """The newest complete iteration of a directory; None where there is none."""
    file = Path(path) / LATEST_FILE
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"{file} should hold a number, not {file.read_text()[:40]!r}",
            "write the number of the newest iter_ folder into it",
        ) from None


def write_latest(path: PathLike, iteration: int) -> None:
    """Declare an iteration complete."""
    write_text(Path(path) / LATEST_FILE, f"{iteration}\n")


def read_construction(path: PathLike) -> dict[str, Any] | None:
    """How the experts of a checkpoint were made; None for a plain dense import."""
    file = Path(path) / CONSTRUCTION_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def write_construction(path: PathLike, construction: dict[str, Any]) -> None:
    """Write `construction.json` into a directory."""
    write_text(Path(path) / CONSTRUCTION_FILE, json.dumps(construction) + "\n")


def copy_companions(source: PathLike, target: PathLike) -> None:
    """Take model.yaml, construction.json and tokenizer/ of a checkpoint along into a run."""
    source, target = Path(source), Path(target)
    for name in (MODEL_FILE, CONSTRUCTION_FILE):
        if (source / name).is_file():
            write_text(target / name, (source / name).read_text())
    if (source / TOKENIZER_DIR).is_dir():
        shutil.copytree(source / TOKENIZER_DIR, target / TOKENIZER_DIR, dirs_exist_ok=True)


def copy_tokenizer(source: PathLike, target: PathLike) -> list[str]:
    """Copy the tokenizer and generation files that `source` has into `target`; their names."""
    found = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def check_output(output: PathLike, force: bool) -> None:
    """Refuse an output directory that must not be overwritten, before any work is done.

    Raises:
        UserError: it is a file, it is not empty, or (with `force`) it is not a model either.
    """
    output = Path(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output {output} is a file", "name a directory")
    if not any(output.iterdir()):
        return
    if not force:
        raise UserError(f"output {output} is not empty", "name another directory, or add --force")
    if not any((output / name).is_file() for name in (MODEL_FILE, "config.json")):
        raise UserError(
            f"output {output} is not empty and holds no model; --force replaces models only",
            "name another directory",
        )


@contextlib.contextmanager
def staged_directory(output: PathLike, force: bool = False) -> Iterator[Path]:
    """A directory to fill; it takes the name `output` when the block ends without an error.

    Raises:
        UserError: see `check_output`.
    """
    output = Path(os.path.abspath(output))
    check_output(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            os.replace(output, replaced)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
