"""What a run shows: a log line a step, metrics.jsonl always, Weights & Biases when asked, a
progress bar.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_ext.config import RunConfig
from megatron_ext.recipe import to_dict

logger = logging.getLogger(__name__)


class Metrics:
    """Sinks of the main rank; on other ranks every call does nothing."""

    def __init__(self, run: RunConfig, is_main: bool, first_step: int, run_id: str | None) -> None:
        self._file: IO[str] | None = None
        self._wandb: Any = None
        self._bar: tqdm | None = None
        self.run_id = run_id
        """wandb's id of this run; kept in the checkpoint so that a resumed run goes on in the same
        curves.
        """
        if not is_main:
            return
        if run.checkpoint.save:
            path = Path(run.checkpoint.save) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            _forget_after(path, first_step)
            self._file = path.open("a")
        if run.logging.wandb_project:
            self._start_wandb(run)
        if run.logging.progress and sys.stderr.isatty():
            self._bar = tqdm(total=run.training.train_iters, initial=first_step, unit="step")

    def _start_wandb(self, run: RunConfig) -> None:
        import wandb

        name = run.logging.wandb_name or (
            Path(run.checkpoint.save).name if run.checkpoint.save else None
        )
        self._wandb = wandb.init(
            project=run.logging.wandb_project,
            name=name,
            id=self.run_id,
            resume="allow",
            config=to_dict(run),
            dir=run.checkpoint.save,
        )
        self.run_id = self._wandb.id

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row: `kind` (train, valid, ...), the step it belongs to, numbers by name (nested by
        '/').
        """
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            logger.info("%s", text)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run does again, and a row cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept))
