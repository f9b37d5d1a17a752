"""Where things lie in a checkpoint directory: the same for converted checkpoints and for runs.

    DIR/model.yaml                          the ModelConfig
    DIR/latest_checkpointed_iteration.txt   number of the newest complete iteration
    DIR/best.json                           iteration of the lowest held-out loss, where kept
    DIR/iter_0000000/                       weights, as megatron-core's torch_dist
    DIR/construction.json                   how the experts were made (not in a dense import)
    DIR/tokenizer/                          tokenizer and generation settings, for export

Imports nothing heavy: the command line reads model.yaml before it knows what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.files import written_whole
from megatron_ext.recipe import from_dict, to_dict

MODEL_FILE = "model.yaml"
LATEST_FILE = "latest_checkpointed_iteration.txt"
BEST_FILE = "best.json"
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
JOB_FILE = "conversion.json"  # in a directory that is being filled
INPUT_SUFFIXES = {
    ".safetensors",
    ".json",
    ".gguf",
    ".distcp",
    ".yaml",
    ".jsonl",
    ".npy",
    ".pt",
    ".idx",  # of tokens; their .bin changes with it
}
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


def kept_iterations(path: PathLike) -> list[int]:
    """Iterations that a directory holds, in order."""
    names = (entry.name for entry in Path(path).iterdir()) if Path(path).is_dir() else ()
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,}", name))


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


def read_best(path: PathLike) -> tuple[int, float] | None:
    """Iteration with the lowest held-out loss, and that loss; None where no run kept one."""
    try:
        best = json.loads((Path(path) / BEST_FILE).read_text())
    except FileNotFoundError:
        return None
    return best["iteration"], best["loss"]


def write_best(path: PathLike, iteration: int, loss: float) -> None:
    """Say which iteration is the best; its checkpoint is not removed."""
    write_text(Path(path) / BEST_FILE, json.dumps({"iteration": iteration, "loss": loss}) + "\n")


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
    with written_whole(path) as partial:
        partial.write_text(text)


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


def describe_job(options: Any) -> dict[str, Any]:
    """What a conversion is to make, so that only the same one goes on with its files.

    Args:
        options: a command's dataclass. Every path in it but `output` is an input, known by the
            sizes and times of its files.

    Returns:
        JSON values.
    """
    values = dataclasses.asdict(options)
    for name in ("output", "force", "skip_verify"):  # they do not change what is written
        values.pop(name, None)
    job: dict[str, Any] = {"command": type(options).__name__}
    for name, value in _leaves(values):
        job[name] = os.path.abspath(value) if isinstance(value, Path) else value
        if isinstance(value, Path) and value.exists():
            files = sorted(value.rglob("*")) if value.is_dir() else [value]
            job[f"files of {name}"] = {
                str(file.relative_to(value)): [file.stat().st_size, file.stat().st_mtime_ns]
                for file in files
                if file.is_file() and (file.suffix in INPUT_SUFFIXES or file == value)
            }
    plain: dict[str, Any] = json.loads(json.dumps(job, default=str))
    return plain


def differing(left: dict[str, Any], job: dict[str, Any]) -> str:
    """Names of what two of `describe_job` differ in."""
    return ", ".join(sorted(k for k in left.keys() | job if left.get(k) != job.get(k)))


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict | list | tuple) and values:
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in pairs:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values


@contextlib.contextmanager
def staged_directory(
    output: PathLike, force: bool = False, job: dict[str, Any] | None = None
) -> Iterator[Path]:
    """A directory to fill; it takes the name `output` when the block ends without an error.

    Args:
        output: the name.
        force: replace a model of that name, and what another job left unfinished.
        job: `describe_job`'s. What a killed process, an interrupt or a full disk left of it is
            still in the directory when the same job comes again. None: the block starts empty.

    Raises:
        UserError: see `check_output`; another process fills the directory; another job was
            killed while it did.
    """
    output = Path(os.path.abspath(output))
    check_output(output, force)
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        _take_over(partial, job, force)
        try:
            yield partial
        except BaseException as error:
            mendable = isinstance(error, OSError) or not isinstance(error, Exception)
            if job is None or not mendable:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / JOB_FILE).unlink(missing_ok=True)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(output, replaced)
        os.replace(partial, output)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {folder}", "wait for it, or name another output"
            ) from None
        yield
    finally:
        os.close(handle)


def _take_over(partial: Path, job: dict[str, Any] | None, force: bool) -> None:
    """Keep what the same job left in its directory; empty it otherwise."""
    file = partial / JOB_FILE
    if file.is_file():
        left = json.loads(file.read_text())
        if left == job:
            print(f"going on with the unfinished files in {partial}")
            return
        if not force:
            raise UserError(
                f"{partial} holds an unfinished conversion that differs in "
                f"{differing(left, job or {})}",
                "give the same options to finish it; add --force or remove it to start anew",
            )
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if job is not None:
        write_text(file, json.dumps(job, indent=2) + "\n")
