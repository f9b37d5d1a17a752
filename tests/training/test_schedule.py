"""Around the loop: learning rate, counts of work and weights, signals, metrics, domains."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.runs import DOMAINS, make_run, write_data

from megatron_ext.config import DataConfig, DomainConfig, ModelConfig, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.training.flops import flops_per_token

# --- learning rate ----------------------------------------------------------------------------

LR, FLOOR, WARMUP, STEPS = 2e-4, 2e-5, 5, 40


def learning_rates(run: RunConfig) -> list[float]:
    from megatron_ext.training import grid as grids
    from megatron_ext.training.optimizer import build_optimizer, build_training_model

    platform = grids.initialize(run).platform
    optimizer, scheduler = build_optimizer(run, platform, build_training_model(run, platform))
    rates = []
    for _ in range(run.training.train_iters):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)
        scheduler.step(1)
    return rates


def llama_moe_rate(step: int, decay: int) -> float:
    """LLaMA-MoE: linear warm-up, then max(0.1, (1 + cos(pi p)) / 2) of the peak; steps from 1."""
    if step <= WARMUP:
        return LR * step / WARMUP
    share = min((step - WARMUP) / (decay - WARMUP), 1.0)
    return LR * max(FLOOR / LR, 0.5 * (1 + math.cos(math.pi * share)))


@pytest.mark.parametrize("decay", [None, 30], ids=["to the end", "shorter than the run"])
def test_clipped_cosine(decay: int | None) -> None:
    settings = {"lr": LR, "min_lr": FLOOR, "lr_warmup_iters": WARMUP, "lr_decay_iters": decay}
    run = make_run(Path("unused"), optimizer=settings, training={"train_iters": STEPS})
    [found] = run_ranks(1, learning_rates, run)
    expected = [llama_moe_rate(step, decay or STEPS) for step in range(1, STEPS + 1)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[WARMUP - 1] == LR and found[-1] == FLOOR
    assert found.count(FLOOR) > 5  # cut off at the floor, not stretched to end there


# --- counts -----------------------------------------------------------------------------------


def shape(**options: Any) -> ModelConfig:
    values: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        vocab_size=10,
    )
    return ModelConfig(**values | options)


def test_flops_per_token_by_hand() -> None:
    # Multiplications of one token at sequence length 6, heads of width 4.
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # q, k, v, output
    scores = 2 * (6 / 2) * 2 * 4  # q k^T and a v, half of the positions, 2 heads
    dense_ffn = 3 * 8 * 16
    head = 8 * 10
    multiplications = 2 * (attention + scores + dense_ffn) + head
    assert multiplications == 1328
    # An addition for each; twice as much backwards.
    assert flops_per_token(shape(), 6) == 3 * 2 * multiplications

    moe = shape(
        num_experts=4,
        moe_router_topk=2,
        moe_gate="mlp",
        moe_dense_first_layers=1,
        moe_shared_expert_intermediate_size=7,
    )
    moe_ffn = (8 * 4 + 4 * 4) + 2 * (3 * 8 * 4) + 3 * 8 * 7  # gate, two experts, residual
    multiplications = 2 * (attention + scores) + dense_ffn + moe_ffn + head
    assert multiplications == 1328 - 384 + 408
    assert flops_per_token(moe, 6) == 6 * multiplications
    assert flops_per_token(moe, 1000) - flops_per_token(moe, 6) == 6 * 2 * 994 * 2 * 4

    lora = shape(num_experts=4, moe_ffn_hidden_size=16, lora_rank=3, lora_targets=["up", "down"])
    others = 2 * (attention + scores + 8 * 4) + head
    adapters = 2 * 2 * 2 * 3 * (8 + 16)  # two layers, two experts, two targets
    # The shared FFN has no gradient: forward, and backward to its input.
    assert flops_per_token(lora, 6) == 6 * (others + adapters) + 4 * 2 * 2 * dense_ffn


SHAPES: list[dict[str, Any]] = [
    {"num_experts": None},
    {"num_experts": None, "untie_embeddings_and_output_weights": False},
    {},
    {"moe_gate": "mlp", "moe_shared_expert_intermediate_size": 32, "moe_ffn_hidden_size": 48},
    {"moe_dense_first_layers": 1, "moe_dense_last_layers": 2, "moe_router_topk": 3},
]


def counts_of_built_models() -> list[tuple[int, int]]:
    """(parameters of the model that is built, those outside of experts) for every shape."""
    from megatron_ext.model.builder import build_model
    from megatron_ext.training import grid as grids

    results = []
    platform = grids.initialize(make_run(Path("unused"))).platform
    for options in SHAPES:
        sizes = {
            name: parameter.numel()
            for name, parameter in build_model(
                make_run(Path("unused"), model=options), platform
            ).named_parameters()
        }
        outside = sum(size for name, size in sizes.items() if ".experts." not in name)
        results.append((sum(sizes.values()), outside))
    return results


def test_count_parameters_is_what_is_built() -> None:
    from megatron_ext.checkpoint.tensors import count_parameters

    [built] = run_ranks(1, counts_of_built_models)
    for options, (total, outside) in zip(SHAPES, built, strict=True):
        model = make_run(Path("unused"), model=options).model
        active = outside
        if model.is_moe:
            assert model.num_experts is not None
            active += (total - outside) * model.moe_router_topk // model.num_experts
        assert count_parameters(model) == (total, active)


# --- signals ----------------------------------------------------------------------------------


def agreed_stops() -> list[str | None]:
    """Nothing, a signal on rank 1 alone, then a limit that only rank 0 has passed."""
    import torch

    from megatron_ext.training import grid as grids
    from megatron_ext.training.signals import SIGNALS, StopRequest

    rank = grids.initialize(make_run(Path("unused"))).rank
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = StopRequest(torch.device("cpu"))
    answers = [stop.agreed()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    answers.append(stop.agreed())
    stop.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    late = StopRequest(torch.device("cpu"), limit_minutes=-1.0 if rank == 0 else 60.0)
    answers.append(late.agreed())
    return answers


def test_all_ranks_stop_together() -> None:
    assert run_ranks(2, agreed_stops) == [[None, "SIGUSR1", "exit_duration_minutes"]] * 2


# --- metrics ----------------------------------------------------------------------------------


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    from megatron_ext.training.metrics import Metrics

    def rows() -> list[tuple[str, int, float]]:
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [(line["kind"], line["step"], line["loss"]) for line in lines]

    run = make_run(tmp_path, save=str(tmp_path))
    first = Metrics(run, True, 0, None)
    for step in range(1, 6):
        first.log("train", step, {"loss": float(step)})
    first.log("valid", 3, {"loss": 30.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # the machine went down here
    second = Metrics(run, True, 3, None)
    second.log("train", 4, {"loss": 40.0})
    second.close()
    kept = [("train", n, float(n)) for n in (1, 2, 3)] + [("valid", 3, 30.0)]
    assert rows() == [*kept, ("train", 4, 40.0)]
    Metrics(run, False, 0, None).log("train", 9, {"loss": 0.0})  # not the main rank: silent
    assert len(rows()) == 5


# --- domains ----------------------------------------------------------------------------------


def test_find_domains(tmp_path: Path) -> None:
    from megatron_ext.training.data import find_domains

    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        write_data(tmp_path / split)
    (tmp_path / "valid" / "wiki.idx").unlink()
    found = find_domains(DataConfig(data_dir=str(tmp_path)))
    train, valid = tmp_path / "train", tmp_path / "valid"
    assert list(found) == sorted(DOMAINS)
    assert found["code"] == DomainConfig(str(train / "code"), 1.0, str(valid / "code"))
    assert found["wiki"].valid_path is None
    flat = find_domains(DataConfig(data_dir=str(train)))
    assert flat["code"] == DomainConfig(str(train / "code"))

    # `domains` choose among the folder's and weight them; a bare name stands for its path.
    chosen = {"wiki": DomainConfig("wiki", 3.0), "more": DomainConfig("elsewhere/more")}
    found = find_domains(DataConfig(data_dir=str(tmp_path), domains=chosen))
    assert list(found) == ["wiki", "more"] and found["more"].path == "elsewhere/more"
    assert (found["wiki"].path, found["wiki"].weight) == (str(train / "wiki"), 3.0)

    for data, message in [
        (DataConfig(), "the run has no data"),
        (DataConfig(data_dir=str(tmp_path / "none")), "holds no .idx file"),
        (
            DataConfig(data_dir=str(tmp_path), domains={"wikki": DomainConfig("wikki")}),
            "'wikki' is not in .*\n.*did you mean 'wiki'",
        ),
        (
            DataConfig(data_dir=str(tmp_path), domains={"encyclopaedia": DomainConfig("wiki")}),
            "'encyclopaedia' has path 'wiki'\n.*use its name",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            find_domains(data)
