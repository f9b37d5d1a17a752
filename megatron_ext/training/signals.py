"""SIGTERM and SIGUSR1 end a run between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers a signal, and agrees with all ranks on what to do about it.

    SLURM sends SIGUSR1 some minutes before a job's limit and SIGTERM when it pre-empts; a rank may
    get it a step before another does, so the decision is a maximum over ranks.
    """

    def __init__(self, device: torch.device, limit_minutes: float | None = None) -> None:
        self._device = device
        self._received = 0
        self._deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self) -> str | None:
        """Why all ranks stop now (the same text on each), or None. Collective."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        flag = torch.tensor([self._received, int(late)], dtype=torch.int32, device=self._device)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        number, late_anywhere = flag.tolist()
        if number:
            return signal.Signals(number).name
        return "exit_duration_minutes" if late_anywhere else None

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
