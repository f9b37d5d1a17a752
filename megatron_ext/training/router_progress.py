"""What router initialisation keeps on disk between its passes, to go on when interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.errors import UserError
from megatron_ext.files import written_whole


class RouterProgress:
    """One file beside the output, read by every rank when this is made and written by one.

    Args:
        output: the checkpoint that is being made.
        job: what decides on the result (`layout.describe_job`); only the same one goes on.
        force: start anew where another job was interrupted.

    Raises:
        UserError: another job was interrupted.
    """

    def __init__(self, output: Path, job: dict[str, Any], force: bool = False) -> None:
        output = output.absolute()
        self.file = output.with_name(f".{output.name}.unfinished")
        self._job = job
        self.passes = 0
        """Over the seed samples that scores and training have done."""
        self.history: list[dict[str, float]] = []
        """Losses of the epochs that are done."""
        self.tensors: dict[str, Tensor] = {}
        """Sums of scores; from the first epoch on, what training goes on from."""
        if not self.file.is_file():
            return
        with safe_open(self.file, "pt") as stored:
            left = json.loads(stored.metadata()["progress"])
            if left["job"] != job:
                if force:
                    return
                raise UserError(
                    f"{self.file} is of an interrupted run that differs in "
                    f"{layout.differing(left['job'], job)}",
                    "give the same options to go on with it; add --force to start anew",
                )
            self.passes, self.history = left["passes"], left["history"]
            self.tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def keep(self, tensors: dict[str, Tensor], writes: bool) -> None:
        """One more pass is done.

        Args:
            tensors: added to what is kept.
            writes: on one rank.
        """
        self.passes += 1
        self.tensors |= tensors
        if writes:
            progress = {"job": self._job, "passes": self.passes, "history": self.history}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.file) as partial:
                save_file(self.tensors, partial, {"progress": json.dumps(progress)})

    def remove(self) -> None:
        """All is done."""
        self.file.unlink(missing_ok=True)
