"""A parallel layout does not change the mathematics: one process is the oracle of every grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.runs import losses, make_run, train_and_save, write_data

TP, PP, CP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)

GRIDS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {TP: 2}),
    "TP2 with expert-TP2": (2, {TP: 2, ETP: 2}),
    "EP2": (2, {EP: 2}),
    "EP2 all-gather": (2, {EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "EP2 with expert-TP2": (4, {EP: 2, ETP: 2}),
    "PP2": (2, {PP: 2}),
    "PP2 interleaved": (2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2xEP2": (2, {TP: 2, EP: 2}),
    "TP2xEP2 all-gather": (2, {TP: 2, EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "TP2xEP2xPP2": (8, {TP: 2, EP: 2, PP: 2}),
    "CP2": (2, {CP: 2}),
    "CP2xTP2": (4, {CP: 2, TP: 2}),
    "CP2xEP2": (2, {CP: 2, EP: 2}),
    "CP2xPP2": (4, {CP: 2, PP: 2}),
}

# fp32 sums in another order, over 20 steps; a routing decision that flips on a rounding error would
# show.
TOLERANCE = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "LLaMA-MoE": {
        "model": {"moe_gate": "mlp", "moe_shared_expert_intermediate_size": 32},
        "router": {"moe_balance_loss": "cv2", "moe_gate_noise": True, "moe_z_loss_coeff": 1e-3},
    },
    "megatron-core": {
        "model": {"moe_dense_first_layers": 1, "untie_embeddings_and_output_weights": False},
        "router": {"moe_balance_loss": "aux_loss", "moe_aux_loss_coeff": 0.1},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grids")
    write_data(path)
    return path


@pytest.fixture(scope="module", params=VARIANTS)
def start(request: pytest.FixtureRequest, root: Path) -> tuple[Path, dict[str, Any], list[float]]:
    """A saved start (the grids load the same weights), its recipe, and one process's losses from
    there.
    """
    variant = VARIANTS[request.param]
    directory = root / request.param.replace(" ", "_")
    run_ranks(1, train_and_save, make_run(root, save=str(directory), **variant), 1)
    [reference] = run_ranks(1, losses, make_run(root, load=str(directory), **variant), 20)
    return directory, variant, reference


@pytest.mark.parametrize("grid", GRIDS)
def test_losses_equal_one_process(
    grid: str, start: tuple[Path, dict[str, Any], list[float]], root: Path
) -> None:
    directory, variant, reference = start
    world_size, parallel = GRIDS[grid]
    results = run_ranks(
        world_size, losses, make_run(root, parallel, load=str(directory), **variant), 20
    )
    assert all(result == results[0] for result in results), "ranks disagree about the loss"
    assert reference[-1] < reference[0]
    assert results[0] == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("grid", [{TP: 2, PP: 2}, {TP: 2, CP: 2}], ids=["TP2xPP2", "TP2xCP2"])
@pytest.mark.parametrize("loss", ["seq_aux_loss", "global_aux_loss"])
def test_other_balance_losses_on_a_grid(loss: str, grid: dict[str, Any], root: Path) -> None:
    """The global loss averages over micro-batches seen so far, so data parallelism may change
    it.
    """
    router = {"moe_balance_loss": loss, "moe_aux_loss_coeff": 0.1}
    directory = root / f"{loss} {'x'.join(grid)}"
    run_ranks(1, train_and_save, make_run(root, router=router, save=str(directory)), 1)
    training = {"micro_batch_size": 2}
    [reference] = run_ranks(
        1, losses, make_run(root, router=router, training=training, load=str(directory)), 5
    )
    run = make_run(root, grid, router=router, training=training, load=str(directory))
    assert run_ranks(4, losses, run, 5)[0] == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("grid", [{PP: 2}, {CP: 2}], ids=["PP2", "CP2"])
def test_recomputation_changes_nothing(grid: dict[str, Any], root: Path) -> None:
    """Gate noise is drawn again in the backward pass, and loads are counted once."""
    router = {"moe_gate_noise": True}
    plain = make_run(root, grid, router=router)
    recomputed = make_run(root, grid, router=router, training={"recompute_granularity": "full"})
    assert run_ranks(2, losses_and_loads, plain, 4)[0] == pytest.approx(
        run_ranks(2, losses_and_loads, recomputed, 4)[0], rel=1e-6
    )


def losses_and_loads(run: Any, steps: int) -> list[float]:
    from training.runs import make_trainer

    trainer = make_trainer(run)
    results = [trainer.train_step() for _ in range(steps)]
    return [x for result in results for x in (result.loss, result.load_spread, result.aux_loss)]
