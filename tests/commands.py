"""Commands of the project, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*command: Any) -> str:
    """Arguments of the interpreter to what it printed; it must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def torchrun(ranks: int) -> list[str]:
    """What starts a script on that many ranks of this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
