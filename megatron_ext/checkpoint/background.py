"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class BackgroundSaves:
    """One save at a time, in a thread of every rank.

    Make it on all ranks at once. Its ranks talk over a gloo group of their own, so that no message
    of a save is taken for one of the training.
    """

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: Future[None] | None = None

    def start(self, write: Callable[..., object], publish: Callable[[], None]) -> None:
        """Have `write(process_group=...)` run, which returns once all ranks have written, and then
        `publish`. Nothing they touch may change later: they work on copies.
        """
        self.wait()

        def save() -> None:
            write(process_group=self._group)
            publish()

        self._pending = self._thread.submit(save)

    def wait(self) -> None:
        """Until the save under way, if there is one, is done on this rank; raises what it raised.

        Only the rank that publishes knows that the checkpoint has its name.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
