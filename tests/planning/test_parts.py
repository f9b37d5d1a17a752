"""The parts of the planner, each against a sum done by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_ext.planning.assumptions import Rehearsing, Routing
from megatron_ext.planning.hardware import GPUS, Assumed, Machine
from megatron_ext.planning.observer import Call, Observer, Work


def test_the_observer_knows_what_is_alive() -> None:
    observer = Observer()
    with observer:
        a = torch.ones(1000)
        b = a.view(10, 100)[2:]  # no memory of its own
        assert observer.live == 4000
        c = b @ torch.ones(100, 5)
        observer.reset_peak()
        del a
        assert observer.live == 4000 + 160  # b holds it; the second factor is gone
        del b
    assert (observer.live, observer.peak) == (160, 4160)
    assert observer.work.flops == 2 * 8 * 100 * 5
    assert c.shape == (8, 5)


def test_a_rehearsal_has_shapes_but_no_memory() -> None:
    with Rehearsing(Routing(8, 2, 1.0)) as observer:
        huge = torch.ones(10**6, 10**6)
        chosen = huge[:8, :100].masked_select(huge[:8, :100] > 0)
        assert huge.is_meta and chosen.shape == (200,)
        assert float(huge.sum()) == 1.0 and torch.equal(huge, huge)
        assert observer.live > 4e12


@pytest.mark.parametrize(
    ("experts", "topk", "local"), [(8, 2, 2), (16, 4, 1), (8, 2, 8), (6, 4, 3)]
)
@pytest.mark.parametrize("imbalance", [1.0, 1.3, 9.0])
def test_every_token_goes_to_k_experts(
    experts: int, topk: int, local: int, imbalance: float
) -> None:
    tokens, first = 120, experts - local
    counts = Routing(experts, topk, imbalance).counts(tokens, first, local)
    assert counts.sum() == tokens * topk and counts.max() <= tokens
    ours = counts[first:].sum()
    even = tokens * topk * local / experts
    assert ours == min(round(even * imbalance), tokens * min(topk, local))
    assert np.ptp(counts[first:]) <= 1


def test_messages_take_the_links_that_they_cross() -> None:
    assumed = Assumed(network_efficiency=1.0, latency_us=0.0)
    machine = Machine(GPUS["h100"], assumed)
    reduce, exchange = Call("all_reduce", "x"), Call("all_to_all", "x")
    size = 8e9
    node, rails, everyone = range(8), range(0, 64, 8), range(64)
    seconds = machine.message_seconds
    assert seconds(reduce, size, node) == pytest.approx(2 * 7 / 8 * size / 450e9)
    # One member on each node: its own adapter. Eight on each: all of them.
    assert seconds(reduce, size, rails) == pytest.approx(2 * 7 / 8 * size / 50e9)
    assert seconds(reduce, size, everyone) == pytest.approx(2 * 63 / 64 * size / 400e9)
    assert seconds(exchange, size, node) == pytest.approx(7 / 8 * size / 450e9)
    assert seconds(exchange, size, everyone) == pytest.approx(56 / 64 * size / 50e9)
    assert seconds(Call("send", "x", 9), size, (1, 9)) == pytest.approx(size / 50e9)


def test_an_operator_is_bound_by_products_traffic_or_its_launch() -> None:
    assumed = Assumed(matmul_efficiency=0.5, bandwidth_efficiency=0.5, launch_us=5.0)
    machine = Machine(GPUS["a100"], assumed)
    work = Work(kernels=Counter({(312 * 10**9, 10): 2, (0, 2_039_000_000): 3, (4, 4): 10}))
    assert machine.kernel_seconds(work) == pytest.approx(2 * 2e-3 + 3 * 2e-3 + 10 * 5e-6)


def test_work_of_a_step_follows_from_two() -> None:
    call = Call("all_reduce", "x")
    one = Work(Counter({(call, 8): 3, (call, 4): 1}), Counter({(6, 2): 10}))
    two = Work(Counter({(call, 8): 5, (call, 4): 1}), Counter({(6, 2): 17}))
    micro = two.minus(one)
    assert micro.bytes_by_call() == {("all_reduce", "x"): 16.0}
    assert one.plus(micro, 3).flops == 6 * (10 + 3 * 7)
    assert one.plus(micro, 3).messages[call, 8] == 9
