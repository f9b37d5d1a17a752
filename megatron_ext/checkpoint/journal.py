"""Which files of a directory are finished, known after the process that wrote them was killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.layout import write_text

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """First line {"of": identity}, then {"file": name, "bytes": size} for every finished file.

    A file is entered when its bytes are on the disk, so that its line holds after a power cut too.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Open a directory's journal, or start one.

        Args:
            folder: an existing directory.
            identity: of all the files' contents; files of another identity do not count.
        """
        self._path = folder / JOURNAL_FILE
        first: dict[str, Any] = {"of": identity}
        entries = _entries(self._path)
        kept = [entry for entry in entries[1:] if _is_whole(folder, entry)]
        if entries[:1] != [first]:
            kept = []
        self.finished: dict[str, int] = {entry["file"]: entry["bytes"] for entry in kept}
        """Size of every file that is there whole."""
        # Written anew: a line that was cut off must not run into the next one.
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in [first, *kept]))
        self._stream = self._path.open("a")

    def add(self, path: Path) -> None:
        """Enter a file of the directory whose writing has ended."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(handle)
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
        self.finished[path.name] = size
        self._stream.write(json.dumps({"file": path.name, "bytes": size}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the journal to a later process."""
        self._stream.close()

    def remove(self) -> None:
        """All is done: there is nothing to go on with."""
        self.close()
        self._path.unlink()


def _entries(path: Path) -> list[dict[str, Any]]:
    """The lines that are there whole."""
    found: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    file: Path = folder / entry["file"]
    return file.is_file() and file.stat().st_size == entry["bytes"]
