"""The command line of tools/plan.py."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.files import written_whole
from megatron_ext.planning.hardware import GPUS, Assumed, Machine
from megatron_ext.recipe import nearest, parse_run

DOES_NOT_FIT = 3
"""Exit code."""


@dataclass
class Options:
    """Options of the planner."""

    gpu: str = "h100"
    """a100, a100-40g, a800, h100, h800 or h200."""
    world_size: int | None = None
    """GPUs; none: the number in the recipe's first line."""
    search: bool = False
    """Try other grids and rank those that fit."""
    show: int = 12
    """Grids that --search prints."""
    json: str | None = None
    """Also write the plan (--search: a list of plans) to this file."""
    scaling: str | None = None
    """Write the tables of docs/scaling.md to this file; takes no recipe."""
    assumed: Assumed = field(default_factory=Assumed)
    """What the machine is taken to achieve."""


def plan(arguments: Sequence[str] | None = None, description: str = "") -> int:
    """Read options and a recipe, print what it costs; the exit code.

    Raises:
        UserError: an unknown GPU or option; a grid that does not work out (with the nearest that
            fits, where there is one).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    kind = tyro.conf.OmitArgPrefixes[Options]
    if {"-h", "--help"} & set(arguments):
        tyro.cli(kind, args=["--help"], description=description)
    options, rest = tyro.cli(kind, args=arguments, return_unknown_args=True)
    if options.gpu.lower() not in GPUS:
        raise UserError(f"gpu={options.gpu} is not known", nearest(options.gpu.lower(), GPUS))
    machine = Machine(GPUS[options.gpu.lower()], options.assumed)
    if options.scaling:
        from megatron_ext.planning.scaling import scaling_document

        _write(options.scaling, scaling_document(options.assumed))
        return 0
    run = parse_run(rest)
    world_size = options.world_size or recipe_world_size(rest)
    if options.search:
        code, result = _search(run, world_size, machine, options.show)
    else:
        code, result = _plan(run, world_size, machine)
    if options.json:
        _write(options.json, json.dumps(result, indent=2) + "\n")
    return code


def recipe_world_size(arguments: Sequence[str]) -> int:
    """The number of ranks that a recipe's first line names.

    Raises:
        UserError: it names none, or there is no recipe.
    """
    for place, word in enumerate(arguments):
        name, _, attached = word.partition("=")
        if name == "--config":
            text = Path(attached or arguments[place + 1]).read_text()
            if found := re.match(r"# world_size: (\d+)\n", text):
                return int(found.group(1))
    raise UserError("the number of GPUs is not known", "name it with --world-size")


def _plan(run: RunConfig, world_size: int, machine: Machine) -> tuple[int, Any]:
    from megatron_ext.planning.plan import make_plan
    from megatron_ext.planning.search import nearest_fit
    from megatron_ext.planning.tables import describe, grid_name

    try:
        plan = make_plan(run, world_size, machine)
    except UserError as error:
        fit = nearest_fit(run, world_size, machine)
        if fit is None:
            raise
        nearby = f"{grid_name(fit.run)}, micro_batch_size {fit.run.training.micro_batch_size}"
        raise UserError(
            error.problem, f"{error.fix}; the nearest grid that fits: {nearby}"
        ) from None
    print(describe(plan))
    if plan.fits:
        return 0, plan.summary()
    fit = nearest_fit(run, world_size, machine)
    if fit is None:
        print("\nno grid near it fits: use more GPUs, or GPUs with more memory")
    else:
        size = fit.run.training.micro_batch_size
        print(f"\nthe nearest grid that fits: {grid_name(fit.run)}, micro_batch_size {size}")
    return DOES_NOT_FIT, plan.summary()


def _search(run: RunConfig, world_size: int, machine: Machine, show: int) -> tuple[int, Any]:
    from megatron_ext.planning.search import rank_grids
    from megatron_ext.planning.tables import NOTE, compare

    plans = rank_grids(
        run, world_size, machine, lambda grids: tqdm(grids, desc="rehearsing", unit="grid")
    )
    if not plans:
        print("no grid fits: use more GPUs, or GPUs with more memory")
        return DOES_NOT_FIT, []
    print(compare(plans[:show]))
    print(f"\n{len(plans)} grids of {world_size} x {machine.gpu.name} fit.\n{NOTE}")
    return 0, [plan.summary() for plan in plans]


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(Path(path)) as partial:
        partial.write_text(text)
