"""Run a function on several real ranks (gloo), forked after the imports that take seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

TIMEOUT_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world_size` processes with torchrun's environment.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        AssertionError: a rank failed (with its traceback) or did not end in time.
    """
    # Imported once here, inherited by every rank.
    import torch

    import megatron_ext.training.trainer  # noqa: F401

    assert not torch.distributed.is_initialized(), (
        "gloo does not survive a fork: see DO_BOTH in conftest.py"
    )
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(theirs, rank, world_size, port, function, arguments)
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results: list[Any] = [None] * world_size
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    try:
        while waiting:
            ready = wait(list(waiting), TIMEOUT_SECONDS)
            assert ready, f"ranks {sorted(waiting.values())} did not end in {TIMEOUT_SECONDS} s"
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died without a word") from None
                if not ok:
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
    finally:
        for process, _ in ranks:
            process.join(5 if not waiting else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _rank(
    connection: Any, rank: int, world_size: int, port: int, function: Any, arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    # The inherited lock is one for all processes: a rank that is killed would keep it for ever.
    tqdm.set_lock(threading.RLock())
    try:
        connection.send((True, function(*arguments)))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # no atexit handlers of the parent, no waiting for gloo's threads
