"""From the recipe's domains to the plan, the streams and the loader of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import DataConfig, DomainConfig, RunConfig
from megatron_ext.data.blend import BlendPlan
from megatron_ext.data.loader import BatchLoader
from megatron_ext.data.stream import TokenStream
from megatron_ext.errors import UserError
from megatron_ext.recipe import nearest


@dataclass
class TrainingData:
    """What a run reads."""

    names: list[str]
    """Data sets, in the order of their ids."""
    plan: BlendPlan
    loader: BatchLoader
    valid: dict[str, TokenStream]
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
    streams = [TokenStream(domains[name].path, length, seed, name) for name in names]
    plan = BlendPlan(
        names,
        [stream.num_samples for stream in streams],
        [domains[name].weight for name in names],
        seed,
        max_epochs=[domains[name].max_epochs for name in names],
        lag=max(lag, run.data.num_prefetch),
    )
    loader = BatchLoader(
        plan,
        streams,
        run.training.micro_batch_size,
        data_rank,
        data_size,
        length,
        prefetch=run.data.num_prefetch,
        read_tokens=read_tokens,
    )
    valid = {
        name: TokenStream(path, length, seed, name)
        for name in names
        if (path := domains[name].valid_path) is not None
    }
    return TrainingData(names, plan, loader, valid)
