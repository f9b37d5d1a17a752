"""Which shards of an unfinished preprocessing run are done, so that a rerun continues it."""

import fcntl
import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

# The part of a request that decides what a chunk of given lines becomes.
_SHARD_SETTINGS = (
    "format_version",
    "tokenizer",
    "json_key",
    "append_eod",
    "template",
    "seq_length",
    "seed",
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names of the settings in which two requests differ, for an error."""
    return ", ".join(key for key in new if key not in old or old[key] != new[key])


class Journal:
    """Which shards are finished: a line of JSON for each, in the partial output, which it locks."""

    def __init__(self, partial: Path, request: dict[str, Any]) -> None:
        self.partial, self.shards = partial, partial / "shards"
        self._settings = {key: request[key] for key in _SHARD_SETTINGS if key in request}
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Journal":
        self.shards.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial / "journal.jsonl", "a+b")
        try:
            # Not flock: workers would inherit it, and hold it a moment longer than a killed parent.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise UserError(f"another run is writing {self.partial}", "wait for it") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        # The piece after the last line end is nothing, or a line that a killed run did not finish.
        lines = self._file.read().split(b"\n")[:-1]
        self._file.truncate(sum(len(line) + 1 for line in lines))
        entries = [json.loads(line) for line in lines]
        if not entries:
            self._append(self._settings)
        elif entries[0] != self._settings:
            raise UserError(
                f"{self.partial} holds unfinished work with another "
                + differences(entries[0], self._settings),
                "rerun as before to continue it, or delete it to start afresh",
            )
        self.records = {record["shard"]: record for record in entries[1:]}

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def add(self, record: dict[str, Any]) -> None:
        self.records[record["shard"]] = record
        self._append(record)

    def has(self, shard: str, source: list[Any], allow_skipped: bool) -> bool:
        """Whether a shard is finished, of the same input, and whole."""
        record = self.records.get(shard)
        if record is None or record["source"] != source:
            return False
        if record["skipped"] and not allow_skipped:
            return False
        for suffix in ("bin", "docs"):
            path = self.shards / f"{shard}.{suffix}"
            if not path.exists() or path.stat().st_size != record[f"{suffix}_bytes"]:
                return False
        return True
