"""Every recipe is accepted for the number of ranks that it is made for, says what that is, and fits
on the GPUs that it is made for.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.mixing.strategies import make_strategy
from megatron_ext.mixing.strategies.published import MIXTURES
from megatron_ext.recipe import parse_run
from megatron_ext.validation import validate

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = re.compile(r"^# world_size: (\d+)$", re.MULTILINE)
RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    if WORLD_SIZE.search(path.read_text())
}
DOMAINS = {"sft": list(MIXTURES["moe_sft_final"]), "pretrain": list(MIXTURES["llama"])}


def load(name: str) -> tuple[RunConfig, int]:
    """A recipe as an entry point reads it, and the ranks in its first line."""
    text = RECIPES[name].read_text()
    size = WORLD_SIZE.search(text)
    assert size and text.startswith(size.group())
    return parse_run(["--config", str(RECIPES[name])]), int(size.group(1))


@pytest.mark.parametrize("name", RECIPES)
def test_the_grid_works_out(name: str) -> None:
    run, world_size = load(name)
    validate(run, world_size)
    make_strategy(run.mixing.strategy, DOMAINS[run.data.task], run.mixing.options)
    # And is no accident of the check: one rank less is refused.
    with pytest.raises(UserError):
        validate(run, world_size - 1)


@pytest.mark.parametrize("name", RECIPES)
def test_experts_stay_within_a_node(name: str) -> None:
    run, _ = load(name)
    parallel = run.parallel
    assert parallel.expert_model_parallel_size * parallel.expert_tp <= 8
    assert parallel.tensor_model_parallel_size <= 8


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_fits(name: str) -> None:
    """The training step of a rank, on the code that trains, without memory."""
    from megatron_ext.checkpoint.tensors import count_parameters
    from megatron_ext.planning.hardware import GPUS, Assumed, Machine
    from megatron_ext.planning.search import quick_plan

    run, world_size = load(name)
    gpu = GPUS["a100" if "a100" in name else "h100"]
    plan = quick_plan(run, world_size, Machine(gpu, Assumed()))
    assert plan.fits, plan.dearest.peak
    assert 0.1 < plan.mfu < gpu.matmul
    # What the comments say.
    stage = plan.dearest
    comments = " ".join(RECIPES[name].read_text().replace("#", " ").split())
    said = re.search(r"(\d+) GB of weights and gradients", comments)
    assert said and int(said[1]) == pytest.approx((stage.weights + stage.gradients) / 1e9, abs=0.6)
    said = re.search(r"(\d+) GB of activations", comments)
    assert said and int(said[1]) == pytest.approx(stage.activations / 1e9, abs=0.6)
    # A rank has its share of the experts and of the layers.
    split = run.parallel.pipeline_model_parallel_size * run.parallel.expert_model_parallel_size
    assert stage.parameters > count_parameters(run.model)[0] / split


def test_llama_moe_has_the_paper_s_hyper_parameters() -> None:
    """arXiv 2406.16554 and its scripts: 14.7 M tokens a step, 200 B in all."""
    runs = [load(name)[0] for name in RECIPES if name.startswith("llama2_7b")]
    experts = {(run.model.moe_router_topk, run.model.num_experts) for run in runs}
    assert experts == {(2, 8), (4, 16), (2, 16)}
    for run in runs:
        tokens = run.training.global_batch_size * run.data.seq_length
        assert tokens == 14_680_064
        assert run.training.train_iters * tokens == pytest.approx(200e9, rel=1e-4)
        model, optimizer = run.model, run.optimizer
        assert model.num_experts and model.moe_score_scale == model.num_experts / (
            model.moe_router_topk
        )
        assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_iters) == (2e-4, 2e-5, 100)
        assert (optimizer.weight_decay, optimizer.adam_beta2) == (0.1, 0.95)


def test_the_sizes_that_the_comments_name() -> None:
    from megatron_ext.checkpoint.tensors import count_parameters

    billions = {
        name: tuple(count / 1e9 for count in count_parameters(load(name)[0].model))
        for name in RECIPES
    }
    assert billions["llama3_8b_upcycled_16nodes"] == pytest.approx((47.5, 13.7), abs=0.05)
    assert billions["llama2_7b_2of8_8xa100"] == pytest.approx((6.74, 3.49), abs=0.01)
    assert billions["llama2_7b_2of16_16nodes"] == pytest.approx((6.74, 2.95), abs=0.01)
