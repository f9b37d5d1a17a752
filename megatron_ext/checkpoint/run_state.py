"""Save and load a training run: weights, optimizer, schedule, sample order, on any grid.

    RUN/model.yaml                         shape of the model
    RUN/latest_checkpointed_iteration.txt  what a resumed run starts from
    RUN/iter_0000100/                      megatron-core distributed checkpoint + run_state.json

A checkpoint is written under another name and renamed when it is complete: what a name says is
    there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.background import BackgroundSaves
from megatron_ext.config import ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.platform import save_strategy
from megatron_ext.recipe import to_dict

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"

FREE_FIELDS = {"moe_router_topk", "moe_score_scale", "max_position_embeddings", "init_method_std"}
"""Model fields that a run may set differently from its checkpoint: they have no weights."""

LATE_PARAMETERS = (".router.noise_weight", ".router.expert_bias")
"""Weights a run may add to a checkpoint that has none: they start from zero."""


def metadata() -> dict[str, Any]:
    """How state dicts are sharded: one key per layer, so that conversion can work layer by
    layer.
    """
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state_dict(model: list[Any]) -> dict[str, Any]:
    """Sharded state of all model chunks of this rank, keyed by chunk."""
    state = {}
    for number, chunk in enumerate(model):
        sharded = unwrap(chunk).sharded_state_dict(metadata=metadata())
        state[f"model{number}"] = {
            key: value
            for key, value in sharded.items()
            # Empty objects of megatron-core's local layers; converters would have to invent them.
            if not (isinstance(value, ShardedObject) and key.endswith("_extra_state"))
        }
    return state


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside DDP and the 16-bit wrapper."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def save_run(
    directory: str | os.PathLike[str],
    iteration: int,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    state: dict[str, Any],
    keep_latest: int = 2,
    background: BackgroundSaves | None = None,
) -> Path:
    """Write the checkpoint of `iteration`; collective over all ranks.

    Args:
        directory: the run directory.
        model: this rank's chunks.
        state: what else resumes the run (JSON values): sample order, counters.
        keep_latest: older checkpoints are removed; 0 keeps all.
        background: write while the training goes on, from a copy; None: before this returns.

    Returns:
        The checkpoint's directory.
    """
    if background is not None:
        background.wait()
    root = Path(directory)
    final = layout.iteration_dir(root, iteration)
    partial = final.with_name(final.name + ".incomplete")
    is_main = torch.distributed.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    for chunk in model:
        # Overlapped, the parameters that other ranks updated come with the next forward pass only.
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    sharded = model_state_dict(model)
    sharded["optimizer"] = _optimizer_state_dict(optimizer, sharded)
    _add_other_stages(sharded["optimizer"])
    strategy = save_strategy(staged=background is not None)
    dist_checkpointing.save(sharded, str(partial), strategy)
    text = json.dumps({**state, "iteration": iteration, "scheduler": scheduler.state_dict()})

    def publish() -> None:
        if not is_main:
            return
        (partial / RUN_STATE).write_text(text)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        layout.write_latest(root, iteration)
        _prune(root, keep_latest)

    if background is not None:
        background.start(strategy.write, publish)
    else:
        publish()
        torch.distributed.barrier()
    return final


def _optimizer_state_dict(
    optimizer: Any, model_state: dict[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """Sharded state of the dense and the expert optimizer, under names that no grid changes.

    (megatron-core numbers the optimizers of a rank, and a rank without experts has one less.)
    """
    # One mapping of all chunks, in which the optimizer finds the sharding of its parameters.
    flat = model_state["model0"] if len(model_state) == 1 else dict(model_state)
    state = {}
    for kind, part in _parts(optimizer).items():
        part_state = part.sharded_state_dict(flat, is_loading=is_loading, metadata=metadata())
        add_prefix_for_sharding(part_state, f"optimizer.{kind}.")
        state[kind] = part_state
    return state


def _add_other_stages(state: dict[str, Any]) -> None:
    """Add what only later stages know of what is saved once (collective).

    megatron-core takes values that are not sharded, as an optimizer's step, from rank 0; where the
    first stage has dense layers only, the expert optimizer of that rank has no parameters.
    """
    plain, _ = extract_matching_values(state, lambda value: not isinstance(value, ShardedBase))
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(stages, plain, group=group)
    for stage in stages:
        _add_missing(state, stage)


def _add_missing(values: dict[str, Any], more: dict[str, Any]) -> None:
    """What `more` holds and `values` does not, at any depth of dictionaries."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _add_missing(values[key], value)
        else:
            values.setdefault(key, value)


def _parts(optimizer: Any) -> dict[str, Any]:
    return {
        "expert" if part.param_groups[0]["is_expert_parallel"] else "dense": part
        for part in optimizer.chained_optimizers
    }


def _prune(root: Path, keep_latest: int) -> None:
    if keep_latest < 1:
        return
    best = layout.read_best(root)
    for old in layout.kept_iterations(root)[:-keep_latest]:
        if best is None or old != best[0]:
            shutil.rmtree(layout.iteration_dir(root, old), ignore_errors=True)


def load_run(
    directory: str | os.PathLike[str],
    model: list[Any],
    optimizer: Any = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Load the latest checkpoint; collective over all ranks.

    Without an optimizer, or from a converted checkpoint, only weights are read.

    Returns:
        The run state; `iteration` 0 where only weights were read.

    Raises:
        UserError: there is no checkpoint, or its weights are not this model's.
    """
    iteration = layout.latest_iteration(directory)
    if iteration is None:
        raise UserError(
            f"{directory} holds no checkpoint",
            "give a run directory, or convert a model with tools/convert_llama.py",
        )
    path = layout.iteration_dir(directory, iteration)
    # Before the first step the optimizer has no state.
    resumes = optimizer is not None and iteration > 0 and (path / RUN_STATE).exists()
    sharded = model_state_dict(model)
    if resumes:
        sharded["optimizer"] = _optimizer_state_dict(optimizer, sharded, is_loading=True)
    else:
        _drop_late_parameters(sharded, path)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = dist_checkpointing.load(sharded, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    for number, chunk in enumerate(model):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{number}"], strict=False)
        missing = [k for k in missing if not k.endswith(("_extra_state", *LATE_PARAMETERS))]
        if missing or unexpected:
            raise UserError(
                f"{path} does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
    if not resumes:
        if optimizer is not None:
            optimizer.reload_model_params()
        return {"iteration": 0}
    for kind, part in _parts(optimizer).items():
        part.load_state_dict(loaded["optimizer"][kind])
    state: dict[str, Any] = json.loads((path / RUN_STATE).read_text())
    if scheduler is not None:
        scheduler.num_steps = 0
        scheduler.step(state["scheduler"]["num_steps"])
    return state


def _drop_late_parameters(sharded: dict[str, Any], path: Path) -> None:
    in_checkpoint = dist_checkpointing.load_tensors_metadata(str(path))
    for chunk in sharded.values():
        for key in [k for k in chunk if k.endswith(LATE_PARAMETERS)]:
            if chunk[key].key not in in_checkpoint:
                del chunk[key]


def check_model(directory: str | os.PathLike[str], model: ModelConfig) -> None:
    """Compare the recipe's model with the checkpoint's, before anything is built.

    Raises:
        UserError: a field that has weights differs.
    """
    found = layout.find_model_config(directory)
    if found is None:
        return
    stored = to_dict(dataclasses.replace(ModelConfig(), **found))
    wanted = to_dict(model)
    different = [
        f"{name}={wanted[name]} (checkpoint: {stored[name]})"
        for name in wanted
        if name not in FREE_FIELDS and wanted[name] != stored[name]
    ]
    if different:
        raise UserError(
            f"the recipe's model is not that of {directory}: {', '.join(different)}",
            "leave these fields out of the recipe: they come from the checkpoint",
        )
