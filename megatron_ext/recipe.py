"""Recipe files and command lines: from YAML and options to the dataclasses of `config.py`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megatron_ext.config import DomainConfig, RunConfig
from megatron_ext.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: what was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


def _refuse_unknown(values: dict[str, Any], cls: type, where: str) -> None:
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown key '{where}{name}'", nearest(name, hints))
        if is_dataclass(hints[name]) and isinstance(value, dict):
            _refuse_unknown(value, hints[name], f"{where}{name}.")
        elif hints[name] == dict[str, DomainConfig] and isinstance(value, dict):
            for domain, entry in value.items():
                if isinstance(entry, dict):
                    _refuse_unknown(entry, DomainConfig, f"{where}{name}.{domain}.")


def from_dict(cls: type, values: dict[str, Any], source: str) -> Any:
    """Build a config dataclass from plain values, with types checked (pydantic).

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(values, cls, "")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{source}: {name}={first['input']!r}: {first['msg']}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config dataclass."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe file as a dict; a UserError where it is missing or not a mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of sections")
    return values or {}


def _peek(arguments: Sequence[str], name: str) -> str | None:
    """Value of --name in the command line, before it is parsed."""
    for spelling in {f"--{name}", f"--{name.replace('-', '_')}"}:
        for position, argument in enumerate(arguments):
            if argument.startswith(spelling + "="):
                return argument.split("=", 1)[1]
            if argument == spelling and position + 1 < len(arguments):
                return arguments[position + 1]
    return None


def parse_run(
    arguments: Sequence[str] | None = None,
    description: str = "",
    defaults: dict[str, dict[str, Any]] | None = None,
) -> RunConfig:
    """Read `--config RECIPE.yaml` and the command line into one RunConfig.

    The model's shape comes from the checkpoint that is loaded; recipe and command line may change
    only what does not contradict its weights (checked when it is loaded). Order: defaults <
    checkpoint's model < recipe < command line; `defaults` are an entry point's own, by section.

    Raises:
        UserError: unknown key, wrong type, missing file.
    """
    import tyro

    from megatron_ext.checkpoint.layout import find_model_config

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe_path = _peek(arguments, "config")
    recipe = read_yaml(recipe_path) if recipe_path else {}
    _refuse_unknown(recipe, RunConfig, "")
    for name, values in (defaults or {}).items():
        recipe[name] = {**values, **(recipe.get(name) or {})}
    sections = recipe.get("checkpoint") or {}
    for source in ("save", "load"):
        path = _peek(arguments, source) or sections.get(source)
        found = find_model_config(path) if path else None
        if found is not None:
            recipe["model"] = {**found, **(recipe.get("model") or {})}
            break
    for name in [key for key, value in recipe.items() if value is None]:
        del recipe[name]
    default = from_dict(RunConfig, recipe, str(recipe_path or "recipe"))

    with_prefixes = tyro.conf.OmitArgPrefixes[tyro.conf.FlagConversionOff[RunConfig]]
    cleaned = _without_option(arguments, "config")
    config: RunConfig = tyro.cli(
        with_prefixes, args=cleaned, default=default, description=_describe(description)
    )
    return config


def _describe(text: str) -> str:
    return f"{text}\n\n--config RECIPE.yaml: read a recipe first; the options below override it."


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == f"--{name}":
            skip = True
        elif not argument.startswith(f"--{name}="):
            kept.append(argument)
    return kept
