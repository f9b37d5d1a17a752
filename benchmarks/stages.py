"""Stages of a study: tools that are run once each, with their times, so that a study can go on.

Benchmarks are run as scripts (`python benchmarks/NAME.py`), so they say `from stages import step`.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_ext.errors import UserError  # noqa: E402


def step(folder: Path, name: str, program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a tool, once: its output goes to NAME.out, its times to NAME.json.

    Raises:
        UserError: it fails, or the folder holds the result of other arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command, done = [program, *arguments], folder / f"{name}.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        if found["command"] != command:
            raise UserError(
                f"{done} is of another study: {' '.join(found['command'])}",
                "give the same options to go on, or another --work",
            )
        return found
    print(f"{folder.parent.name}/{folder.name}: {name}", flush=True)
    log, partial = folder / f"{name}.log", folder / f"{name}.out.partial"
    start = time.monotonic()
    with log.open("w") as errors, partial.open("w") as output:
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, str(ROOT / program), *arguments],
            {**os.environ, "PYTHONPATH": str(ROOT)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(process, 0)  # of this process and all that it waited for
    if status:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise UserError(f"{' '.join(command)} failed:\n{tail}", f"all of it is in {log}")
    os.replace(partial, folder / f"{name}.out")
    result = {
        "command": command,
        "wall": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
    }
    unfinished = done.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(unfinished, done)
    return result


def losses_of(row: dict[str, Any]) -> dict[str, float]:
    """Loss of each domain in a row of a run's metrics.jsonl."""
    mark = "loss/"
    return {k.removeprefix(mark): v for k, v in row.items() if k.startswith(mark)}
