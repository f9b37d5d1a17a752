"""Other grids: shallow models tell what deep ones cost, and what fits is ranked by its speed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from training.runs import make_run

from megatron_ext.config import RunConfig
from megatron_ext.planning.hardware import GPUS, Assumed, Machine
from megatron_ext.planning.plan import make_plan, with_libraries
from megatron_ext.planning.search import distance, nearest_fit, quick_plan, rank_grids

H100 = Machine(GPUS["h100"], Assumed())


@pytest.fixture
def run() -> RunConfig:
    """3 layers (which no pipeline of 2 divides) of 2 experts, 2 samples a step."""
    return make_run(
        Path("none"),
        model={"num_layers": 3, "num_experts": 2, "hidden_size": 128, "ffn_hidden_size": 512},
        training={"global_batch_size": 2, "device": "auto"},
    )


def test_a_deep_model_costs_what_shallow_ones_say(run: RunConfig) -> None:
    run.parallel.expert_model_parallel_size = 2
    quick, full = quick_plan(run, 2, H100), make_plan(run, 2, H100)
    [shallow], [deep] = quick.stages, full.stages
    for name in ("parameters", "weights", "gradients", "optimizer", "peak"):
        assert getattr(shallow, name) == pytest.approx(getattr(deep, name), rel=0.01), name
    assert quick.times().step == pytest.approx(full.times().step, rel=0.01)
    assert shallow.work(1).flops == pytest.approx(deep.work(1).flops)
    sent = shallow.work(1).bytes_by_call()
    assert sent == pytest.approx(deep.work(1).bytes_by_call(), rel=0.01)
    # What was put in the place of megatron-core's and torch's is gone again.
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    assert MoEAuxLossAutoScaler.main_loss_backward_scale is None
    assert torch.ones(1).type() == "torch.FloatTensor" and torch.ones(1, device="meta").is_meta
    assert torch.ones(1, device="meta").device.type == "meta"
    assert not torch.distributed.is_initialized()


def test_grids_are_ranked(run: RunConfig) -> None:
    plans = rank_grids(run, 2, H100)
    grids = [
        (
            plan.run.parallel.tensor_model_parallel_size,
            plan.run.parallel.expert_model_parallel_size,
            plan.run.training.micro_batch_size,
        )
        for plan in plans
    ]
    tensor = [(2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2)]
    assert sorted(grids) == [(1, 1, 1), (1, 2, 1), *tensor]
    seconds = [plan.times().step for plan in plans]
    assert seconds == sorted(seconds) and all(plan.fits for plan in plans)
    near = sorted(plans, key=lambda plan: distance(run, plan.run))
    assert near[0].run.parallel == with_libraries(run).parallel


def test_a_gpu_too_small_for_the_weights_fits_nothing(run: RunConfig) -> None:
    small = Machine(dataclasses.replace(GPUS["h100"], memory=1e6), Assumed())
    assert nearest_fit(run, 2, small) is None and rank_grids(run, 2, small) == []
