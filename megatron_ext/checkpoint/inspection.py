"""A checkpoint in a few readable lines."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.checkpoint.layout import read_construction
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import Weights, count_parameters
from megatron_ext.recipe import to_dict


def report(path: Path, weights: Weights) -> str:
    """The model, its size, and how its experts were made."""
    model = weights.model
    total, active = count_parameters(model)
    lines = [
        f"{path}",
        f"  {'mixture of experts' if model.is_moe else 'dense'}, stored as {weights.dtype}".replace(
            "torch.", ""
        ),
        f"  parameters  {total:,} total, {active:,} active per token",
    ]
    if isinstance(weights, CheckpointWeights):
        lines.append(f"  iteration   {weights.iteration}")
    construction = read_construction(path) if path.is_dir() else None
    if construction:
        lines.append(f"  experts     {construction['method']}, seed {construction['seed']}")
        if "neurons" in construction:
            layers = construction["neurons"]
            lines.append(f"  neuron map  {len(layers)} layers (construction.json)")
        lines.append(f"  router      {construction['router']}")
        for source in construction.get("sources") or [construction["source"]]:
            lines.append(f"  from        {source['name']} ({source['fingerprint'][:23]}...)")
    lines.append("  model")
    lines += [
        f"    {name:36} {value}" for name, value in to_dict(model).items() if value is not None
    ]
    return "\n".join(lines)
