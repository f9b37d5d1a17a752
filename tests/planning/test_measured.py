"""What is planned is what real ranks keep and send.

Memory is what the C library says it has handed out, asked while operators run: it knows nothing of
the planner's way of counting and, unlike resident memory, is exact. (torch's profiler does not see
what gloo's threads free.) Messages are counted at the dispatcher of real gloo ranks.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training.runs import make_run, write_data

from megatron_ext.config import RunConfig

TP, PP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)

STEPS = 3
"""gloo's threads let go of a message when they are scheduled, which on a busy machine is late: the
least peak of several steps is that of the step itself.
"""


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo is not None:
    _mallinfo.restype = _Mallinfo

LARGE = 2**14
"""Bytes of a result after which the C library is asked: it walks its lists to answer."""


def heap_bytes() -> int:
    """Bytes that glibc has handed out and not got back, in all of its arenas and mappings."""
    assert _mallinfo is not None
    info = _mallinfo()
    return int(info.uordblks + info.hblkhd)


class Heap(TorchDispatchMode):
    """Asks after every operator that makes a large tensor."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and result.nbytes >= LARGE:
            self.peak = max(self.peak, heap_bytes())
        return result


# Ranks, parallel, training, and whether the ranks do what they would on a GPU (sharded optimizer
# state, whole logits), in fp32 too: for bf16 products CPU libraries hold memory of their own.
Case = tuple[int, dict[str, Any], dict[str, Any], bool]
SHARDED = {"use_distributed_optimizer": True}
CASES: dict[str, Case] = {
    "1": (1, {}, {}, False),
    "1 recomputed": (1, {}, {"recompute_granularity": "full"}, False),
    "TP2": (2, {TP: 2}, {}, False),
    "EP2": (2, {EP: 2}, {}, False),
    "EP2 all-gather": (2, {EP: 2, "moe_token_dispatcher_type": "allgather"}, {}, False),
    "PP2": (2, {PP: 2}, {}, False),
    "TP2xEP2": (2, {TP: 2, EP: 2}, {}, False),
    "DP2 as on GPUs": (2, SHARDED, {"precision": "fp32"}, True),
    "TP2xEP2 as on GPUs": (2, {TP: 2, EP: 2} | SHARDED, {"precision": "fp32"}, True),
}


def recipe(root: Path, case: Case) -> RunConfig:
    """Small, but with more activations than weights."""
    _, parallel, training, _ = case
    run = make_run(
        root,
        parallel,
        model={"hidden_size": 96, "ffn_hidden_size": 256, "max_position_embeddings": 192}
        | {"moe_gate": "mlp"},
        router={"moe_gate_noise": True},
        training={"micro_batch_size": 2, "global_batch_size": 4} | training,
    )
    run.data.seq_length = 192
    return run


def measure(root: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """Each case on this rank: bytes by kind, peak of a step, bytes sent by collective and group."""
    return [_measure(recipe(root, case), case[3]) for case in cases]


def _measure(run: RunConfig, gpu: bool) -> dict[str, Any]:
    import contextlib

    from megatron.core import parallel_state

    from megatron_ext.planning import rehearsal, world
    from megatron_ext.planning.observer import Observer
    from megatron_ext.training import grid as grids
    from megatron_ext.training.data import open_data
    from megatron_ext.training.trainer import Trainer

    grid = grids.initialize(run)
    if gpu:
        grid = world.posing_as_gpu(grid)
    data = open_data(run, grid.data_rank, grid.data_size, grid.reads_tokens)
    paths = world.paths_of_a_gpu() if gpu else contextlib.nullcontext()
    rises = []
    with paths, data.loader:
        trainer = Trainer(run, grid, data)
        if gpu:
            world.fuse_adam(trainer.optimizer)
        trainer.train_step()  # makes the optimizer's state
        for _ in range(STEPS):
            before = heap_bytes()
            with Heap() as heap:
                trainer.train_step()
            rises.append(heap.peak - before)
        with Observer() as observer:
            trainer.train_step()
    parallel_state.destroy_model_parallel()
    return {
        **rehearsal.static_bytes(trainer.model, trainer.optimizer),
        "rise": min(rises),
        "stage": grid.pipeline_rank,
        "messages": observer.work.bytes_by_call(),
    }


pytestmark = pytest.mark.skipif(_mallinfo is None, reason="the C library does not say what it gave")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each case measured; the processes of a number of ranks are started once."""
    root = tmp_path_factory.mktemp("plan")
    write_data(root)
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks in (1, 2):
        names = [name for name, case in CASES.items() if case[0] == ranks]
        by_rank = run_ranks(ranks, measure, root, [CASES[name] for name in names])
        for name, results in zip(names, zip(*by_rank, strict=True), strict=True):
            found[name] = list(results)
    return found


@pytest.mark.parametrize("name", CASES)
def test_planned_is_measured(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    from megatron_ext.planning.rehearsal import num_micro_batches, rehearse

    ranks, parallel, _, gpu = CASES[name]
    run = recipe(Path("none"), CASES[name])
    for stage in range(parallel.get(PP, 1)):
        cost = rehearse(run, ranks, stage, gpu)
        # Loads are uneven by chance: what one rank of a stage has more, another has less.
        real = [result for result in measured[name] if result["stage"] == stage]
        for key in ("weights", "gradients", "optimizer", "rise"):
            mean = sum(result[key] for result in real) / len(real)
            planned = cost.peak - cost.kept if key == "rise" else getattr(cost, key)
            print(name, stage, key, planned / mean)
            # Between the collectives of tensor-parallel experts gloo still holds some messages.
            tolerance = (0.15 if parallel.get(TP) else 0.1) if key == "rise" else 0.01
            assert planned == pytest.approx(mean, rel=tolerance), key
        sent: Counter[tuple[str, str]] = Counter()
        for result in real:
            sent.update(result["messages"])
        expected = cost.work(num_micro_batches(run, ranks)).bytes_by_call()
        assert {key: size / len(real) for key, size in sent.items()} == pytest.approx(expected)
