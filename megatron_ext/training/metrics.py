"""What a run shows: a log line a step, metrics.jsonl always, Weights & Biases when asked, a
progress bar.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_ext.checkpoint.layout import write_text
from megatron_ext.config import RunConfig
from megatron_ext.mixing.controller import Update
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
            numbers = {n: v for n, v in values.items() if isinstance(v, int | float)}
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def log_update(self, update: Update) -> None:
        """A decision about the blend: numbers, and pictures of its tables for wandb."""
        names = list(update.after)
        numbers: dict[str, Any] = {f"weight/{name}": update.after[name] for name in names}
        maps: dict[str, Any] = {"load": list(update.loads.values())} if update.loads else {}
        for kind, values in update.report.items():
            if isinstance(values[0], list):
                maps[kind] = values
            else:
                numbers |= {f"{kind}/{name}": v for name, v in zip(names, values, strict=True)}
        self.log("mixing", update.step, {"effective": update.effective, **numbers, **maps})
        if self._wandb is not None:
            images = {f"mixing/{kind}": _heat_map(kind, names, rows) for kind, rows in maps.items()}
            self._wandb.log(images, step=update.step)

    def log_answers(self, step: int, texts: dict[str, tuple[str, str]]) -> None:
        """Prompts and generated answers by data set."""
        samples = {name: {"prompt": p, "answer": a} for name, (p, a) in texts.items()}
        self.log("sample", step, samples)
        if self._wandb is not None:
            import wandb

            rows = [[name, *pair] for name, pair in texts.items()]
            table = wandb.Table(columns=["data set", "prompt", "answer"], data=rows)
            self._wandb.log({"sample/answers": table}, step=step)

    def write_weights(self, names: Sequence[str], weights_log: list[dict[str, Any]]) -> None:
        """blend_weights.jsonl: weights that were in force, which strategy `schedule` replays."""
        if self._file is not None:
            lines = (
                json.dumps({**e, "weights": dict(zip(names, e["weights"], strict=True))}) + "\n"
                for e in weights_log
            )
            write_text(Path(self._file.name).with_name("blend_weights.jsonl"), "".join(lines))

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


def _heat_map(title: str, names: list[str], rows: list[list[float]]) -> Any:
    """A picture for wandb: data sets by experts, or by data sets."""
    import numpy as np
    import wandb
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.4 * len(rows[0]), 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_yticks(range(len(names)), names)
    if len(rows[0]) == len(names) and title != "load":
        axes.set_xticks(range(len(names)), names, rotation=90)
    table = [[float("nan") if value is None else value for value in row] for row in rows]
    figure.colorbar(axes.imshow(table, aspect="auto"))
    canvas = FigureCanvasAgg(figure)  # wandb would ask pyplot, which looks for a display
    canvas.draw()
    return wandb.Image(np.asarray(canvas.buffer_rgba()))


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
