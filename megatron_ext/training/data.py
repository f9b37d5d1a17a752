"""From the recipe's domains to the plan, the streams and the loader of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import DataConfig, DomainConfig, RunConfig
from megatron_ext.data.blend import BlendPlan
from megatron_ext.data.conversation_stream import ConversationStream
from megatron_ext.data.loader import BatchLoader, Stream
from megatron_ext.data.stream import TokenStream
from megatron_ext.errors import UserError
from megatron_ext.mixing.controller import Controller
from megatron_ext.mixing.strategies import make_strategy
from megatron_ext.recipe import nearest


@dataclass
class TrainingData:
    """What a run reads."""

    names: list[str]
    """Data sets, in the order of their ids."""
    plan: BlendPlan
    mixing: Controller
    """What changes the plan's weights."""
    loader: BatchLoader
    valid: dict[str, Stream]
    """Held-out streams by name."""


def find_domains(data: DataConfig) -> dict[str, DomainConfig]:
    """The run's domains by name: `domains`, or every pair under `data_dir`, or both.

    With `data_dir`, an entry of `domains` may leave its path to the folder by giving the bare name.

    Raises:
        UserError: no domain, or a folder that tools/preprocess_data.py did not write.
    """
    found: dict[str, DomainConfig] = {}
    if data.data_dir is not None:
        root = Path(data.data_dir)
        train = root / "train" if (root / "train").is_dir() else root
        for index in sorted(train.glob("*.idx")):
            name = index.stem
            valid = root / "valid" / name
            found[name] = DomainConfig(
                path=str(train / name),
                valid_path=str(valid) if valid.with_suffix(".idx").exists() else None,
            )
        if not found:
            raise UserError(
                f"data_dir={data.data_dir} holds no .idx file",
                "write it with tools/preprocess_data.py",
            )
        if data.domains:
            for name, domain in data.domains.items():
                if domain.path in found and name not in found:
                    raise UserError(f"domain '{name}' has path '{domain.path}'", "use its name")
                if not domain.path or domain.path == name:
                    if name not in found:
                        raise UserError(f"domain '{name}' is not in {train}", nearest(name, found))
                    domain.path = found[name].path
                    domain.valid_path = domain.valid_path or found[name].valid_path
            found = {**data.domains}
    else:
        found = dict(data.domains)
    if not found:
        raise UserError("the run has no data", "set data_dir, or domains in the recipe")
    return found


def open_data(
    run: RunConfig, data_rank: int, data_size: int, read_tokens: bool, lag: int = 2
) -> TrainingData:
    """Open every domain; every rank gets the same plan.

    Args:
        run: the recipe.
        data_rank, data_size: this rank among its data-parallel ranks.
        read_tokens: False on pipeline stages that need to know only the data set of each sample.
        lag: steps between the decision of a weight change and its effect.
    """
    domains = find_domains(run.data)
    names = list(domains)
    seed, length = run.training.seed, run.data.seq_length
    streams = [open_stream(run, name, domains[name].path) for name in names]
    strategy = make_strategy(run.mixing.strategy, names, run.mixing.options)
    num_samples = [stream.num_samples for stream in streams]
    sizes = length * np.array(num_samples)
    weights = strategy.initial([domains[name].weight for name in names], sizes)
    plan = BlendPlan(
        names,
        num_samples,
        weights.tolist(),
        seed,
        max_epochs=[domains[name].max_epochs for name in names],
        lag=max(lag, run.data.num_prefetch),
    )
    if (known := strategy.weights_log(weights)) is not None:
        plan.replay(known)
    mixing = Controller(run.mixing, strategy, plan, weights, sizes, run.model)
    if (mixing.needs_probe or mixing.needs_losses) and (
        blind := [name for name in names if domains[name].valid_path is None]
    ):
        raise UserError(
            f"mixing strategy {run.mixing.strategy} looks at held-out samples, and "
            f"{', '.join(blind)} has none",
            "set valid_path, or mixing.signal=online where the strategy needs loads only",
        )
    loader = BatchLoader(
        plan,
        streams,
        run.training.micro_batch_size,
        data_rank,
        data_size,
        length,
        prefetch=run.data.num_prefetch,
        # Every stage's attention and routers need to know where conversations end.
        read_tokens=read_tokens or run.data.task == "sft",
    )
    valid = {
        name: open_stream(run, name, path)
        for name in names
        if (path := domains[name].valid_path) is not None
    }
    return TrainingData(names, plan, mixing, loader, valid)


def open_stream(run: RunConfig, name: str, prefix: str) -> Stream:
    """A domain as the run reads it: text, or conversations."""
    seed, length = run.training.seed, run.data.seq_length
    if run.data.task == "sft":
        return ConversationStream(prefix, length, seed, name, run.data.packing)
    if Path(f"{prefix}.mask").exists():
        raise UserError(
            f"domain {name}: {prefix} holds conversations", "set data.task: sft, or use other files"
        )
    return TokenStream(prefix, length, seed, name)
