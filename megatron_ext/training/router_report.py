"""UpIT's stage 3 from seed samples to trained routers, and what is said about it.

E experts, L MoE layers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ext.construction.buckets import assign_buckets, hold_out, random_buckets
from megatron_ext.training.router_init import RouterInitialiser, Training


def optimise(
    initialiser: RouterInitialiser,
    choice: Literal["perplexity", "random"],
    capacity: float,
    held_out: float,
    training: Training,
) -> dict[str, Any]:
    """Score the seed samples, sort them, train the routers, measure before and after (collective).

    Args:
        choice: what buckets are made by.
        capacity: of buckets (`buckets.bucket_bounds`).
        held_out: part of every bucket that is measured on and not trained on.

    Returns:
        JSON values: samples, bucket_sizes [E], bucket_domains {name: [E]}; by perplexity, loss [E]
        of all seed samples under each expert and bucket_loss [E][E] of each bucket under each;
        chance, before and after (`_agreement`), epochs.
    """
    seeds, experts = initialiser.seeds, initialiser.num_experts
    report: dict[str, Any] = {"samples": seeds.size}
    if choice == "perplexity":
        losses = initialiser.score()
        buckets = assign_buckets(losses, capacity)
        trained = seeds.trained * (buckets == np.arange(experts)[:, None])
        sums, tokens = trained @ losses, trained.sum(1, keepdims=True)
        report["loss"] = (sums.sum(0) / tokens.sum()).tolist()
        report["bucket_loss"] = _plain(sums / np.where(tokens > 0, tokens, np.nan))
    else:
        buckets = random_buckets(seeds.size, experts, training.seed)
    report["bucket_sizes"] = np.bincount(buckets, minlength=experts).tolist()
    report["bucket_domains"] = {
        name: np.bincount(buckets[seeds.domains == number], minlength=experts).tolist()
        for number, name in enumerate(seeds.names)
    }
    held = hold_out(buckets, held_out, training.seed)
    report["held_out"] = int(held.sum())
    report["chance"] = [1 / experts, initialiser.run.model.moe_router_topk / experts]
    if held.any():
        report["before"] = _agreement(initialiser.agreement(buckets, np.flatnonzero(held)))
    if training.epochs:
        report["epochs"] = initialiser.train(buckets, np.flatnonzero(~held), training)
        if held.any():
            report["after"] = _agreement(initialiser.agreement(buckets, np.flatnonzero(held)))
    return report


def _agreement(shares: NDArray[np.float64]) -> dict[str, Any]:
    """How often a bucket's held-out tokens reach its expert, as first choice and among the k.

    Args:
        shares: [2, L, E], NaN for an empty bucket.
    """
    return {
        "mean": [float(np.nanmean(share)) for share in shares],
        "by_bucket": _plain(shares.mean(1)),
        "by_layer": _plain(np.nanmean(shares, 2)),
    }


def _plain(values: NDArray[np.float64]) -> Any:
    """Lists of numbers, with None for NaN, which JSON does not have."""
    return [
        _plain(value)
        if isinstance(value, np.ndarray)
        else None
        if np.isnan(value)
        else float(value)
        for value in values
    ]


def table(report: dict[str, Any]) -> str:
    """What is worth seeing of `optimise`'s report, a line for each expert."""
    experts = len(report["bucket_sizes"])
    lines = [f"{report['samples']} seed samples, {report['held_out']} of them held out"]
    columns = {"expert": list(range(experts)), "samples": report["bucket_sizes"]}
    if "loss" in report:
        own = [row[expert] for expert, row in enumerate(report["bucket_loss"])]
        columns["ppl of its bucket"] = [_perplexity(loss) for loss in own]
        columns["ppl of all"] = [_perplexity(loss) for loss in report["loss"]]
    for moment in ("before", "after"):
        if moment in report:
            for name, shares in zip(("1st", "k"), report[moment]["by_bucket"], strict=True):
                columns[f"{name} {moment}"] = [_percent(share) for share in shares]
    lines.append(" | ".join(columns))
    for row in zip(*columns.values(), strict=True):
        places = zip(columns, row, strict=True)
        lines.append(" | ".join(f"{value:>{len(name)}}" for name, value in places))
    for moment in ("before", "after"):
        if moment in report:
            first, among = (_percent(share) for share in report[moment]["mean"])
            lines.append(
                f"{moment}: a held-out token's first choice is its bucket's expert in {first}, "
                f"it is among the k in {among}"
            )
    first, among = (_percent(share) for share in report["chance"])
    lines.append(f"chance: {first}, {among}")
    return "\n".join(lines)


def _perplexity(loss: float | None) -> str:
    return "-" if loss is None else f"{math.exp(min(loss, 50)):.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
