"""Stages of a long job: commands run one after the other, and what is finished is not done twice.

A stage leaves a note, DIR/stages/NAME.json, when it begins and again when it ends. An interrupted
stage is simply run again, with what it wrote in place, so that tools that can resume do. A stage
whose commands or settings differ from its note starts anew, and so does everything after it.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Commands that belong together."""

    name: str
    """Of the note."""
    title: str
    """What is happening, for people."""
    commands: tuple[tuple[str, ...], ...]
    """Command lines; the standard output of one that ends in (">", FILE) goes into that file."""
    outputs: tuple[Path, ...]
    """Files and folders that the stage writes."""
    settings: tuple[Path, ...] = ()
    """Files whose content decides the result, beside the commands."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that are set for the commands."""

    def fingerprint(self) -> str:
        """Changes when commands or settings do."""
        digest = sha256(repr(self.commands).encode())
        for path in self.settings:
            digest.update(path.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Done:
    """A finished stage."""

    name: str
    seconds: float
    peak_bytes: int
    """Largest sum of the resident memory of the stage's processes."""
    skipped: bool = False
    """Whether it had been finished by an earlier run."""


def run_stages(stages: Sequence[Stage], root: Path) -> list[Done]:
    """Run what is not finished yet.

    Args:
        stages: in order; each may read what those before it write.
        root: where the notes are kept.

    Raises:
        UserError: a command failed; its own message is on the screen above.
    """
    done: list[Done] = []
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.title}"
        note = _read_note(_note_path(root, stage))
        if note and note["fingerprint"] == stage.fingerprint():
            if note["seconds"] is not None and all(path.exists() for path in stage.outputs):
                print(f"{head}: done before, in {note['seconds']:.0f} s", flush=True)
                done.append(Done(stage.name, note["seconds"], note["peak_bytes"], skipped=True))
                continue
        elif note:
            for path in stage.outputs:
                _remove(path)
        for later in stages[number:]:  # they read what is about to change
            if _note_path(root, later).exists():
                for path in (*later.outputs, _note_path(root, later)):
                    _remove(path)
        print(f"\n{head}", flush=True)
        done.append(_run(stage, root))
        print(f"    {done[-1].seconds:.0f} s", flush=True)
    return done


def show(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The command as a line to paste into a shell."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    words = [word if word == ">" else shlex.quote(word) for word in command]
    return " ".join([*variables, *words])


def _run(stage: Stage, root: Path) -> Done:
    note: dict[str, Any] = {"fingerprint": stage.fingerprint(), "seconds": None, "peak_bytes": 0}
    _write_note(_note_path(root, stage), note)
    start = time.monotonic()
    environment = dict(stage.environment)
    with PeakMemory() as memory:
        for command in stage.commands:
            print(f"$ {show(command, environment)}", flush=True)
            if code := _call(command, {**os.environ, **environment}):
                raise UserError(
                    f"'{stage.title}' failed (exit code {code}; its message is above)",
                    "mend what it names and start again: finished stages are kept",
                )
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if missing:  # a training that was told to stop ends well, but early
        raise UserError(
            f"'{stage.title}' ended without {', '.join(missing)}",
            "start again: it goes on from what it saved",
        )
    done = Done(stage.name, time.monotonic() - start, memory.peak)
    note |= {"seconds": done.seconds, "peak_bytes": done.peak_bytes}
    _write_note(_note_path(root, stage), note)
    return done


def _call(command: tuple[str, ...], environment: dict[str, str]) -> int:
    if len(command) < 2 or command[-2] != ">":
        return _watch(command, environment, None)
    target = Path(command[-1])
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as file:
        code = _watch(command[:-2], environment, file)
    if not code:
        os.replace(partial, target)
    return code


def _watch(command: Sequence[str], environment: dict[str, str], output: IO[bytes] | None) -> int:
    """Run a command and pass on what it shows, with a dot for every 5 seconds that it says nothing.

    On a terminal the command gets a terminal, so that it shows its progress bars. If we are
    stopped, the command is asked to end and may still save what it has.
    """
    reader, writer = _terminal() if sys.stdout.isatty() else os.pipe()
    environment = {**environment, "PYTHONUNBUFFERED": "1"}  # lines when they are said
    process = subprocess.Popen(command, env=environment, stdout=output or writer, stderr=writer)
    os.close(writer)
    try:
        _pass_on(reader)
    except BaseException:
        process.terminate()
        _pass_on(reader)
        raise
    finally:
        process.wait()
        os.close(reader)
    return process.returncode


def _pass_on(reader: int, every: float = 5.0) -> None:
    """Show what comes until the other end is closed; a dot for every silent `every` seconds."""
    at_line_start = waiting = False
    while True:
        if not select.select([reader], [], [], every)[0]:
            _show(b".")
            waiting = True
            continue
        try:
            data = os.read(reader, 1 << 16)
        except OSError:  # how Linux says that the other end of a terminal is closed
            return
        if not data:
            return
        _show(b"\n" + data if waiting and at_line_start else data)
        at_line_start, waiting = data.endswith(b"\n"), False


def _terminal() -> tuple[int, int]:
    """Both ends of a terminal as wide as ours."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
    return reader, writer


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


class PeakMemory:
    """Watches this process and its descendants; `peak` is the largest sum of resident memory.

    Pages that processes share are counted in each of them, so the truth is a little lower.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.peak = 0
        self._interval = interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            self.peak = max(self.peak, total)
            if self._end.wait(self._interval):
                return


def _note_path(root: Path, stage: Stage) -> Path:
    return root / "stages" / f"{stage.name}.json"


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(path.read_text())
        return note
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write_note(path: Path, note: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(note))
    os.replace(partial, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def python() -> str:
    """This interpreter, as short as a shell in the working directory understands it."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
