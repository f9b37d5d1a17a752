"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when it is complete."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    yield partial
    os.replace(partial, path)
