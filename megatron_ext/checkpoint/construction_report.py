"""The report of a construction: what its experts are, beside the checkpoint that holds them.

DIR/report.json    all figures
DIR/report.md      the same to read
DIR/report.png     layer by layer, where inputs of the dense FFNs are known
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ext.checkpoint.experts import fingerprint, recorded_neurons
from megatron_ext.checkpoint.layout import read_construction, write_text
from megatron_ext.checkpoint.lora import full_experts
from megatron_ext.checkpoint.reader import CheckpointWeights
from megatron_ext.checkpoint.tensors import (
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC2,
    ROUTER,
    ROUTER_OUT,
    SHARED_FC1,
    SHARED_FC2,
    Weights,
    count_parameters,
    layer_key,
)
from megatron_ext.config import ModelConfig
from megatron_ext.construction import report as measures
from megatron_ext.construction.statistics import Statistics
from megatron_ext.construction.upcycling import replica_map
from megatron_ext.errors import UserError
from megatron_ext.files import written_whole

NAME = "report"
_MEANS = ("error", "error_all", "norm_ratio", "imbalance", "overlap")
_TITLES = {
    "layer": "layer",
    "score_scale": "score scale",
    "error": "error",
    "error_all": "error, all experts",
    "norm_ratio": "norm ratio",
    "imbalance": "largest load / mean",
    "overlap": "overlap",
}


def collect(
    moe: CheckpointWeights,
    dense: Weights,
    statistics: Statistics | None,
    num_inputs: int,
    perplexity: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Contents of report.json; one layer is in memory at a time.

    Args:
        moe: a mixture.
        dense: the model that it was made of (one of them).
        statistics: with sampled FFN inputs; none: only what needs no inputs.
        num_inputs: how many of them are used in each layer.
        perplexity: `before` and `after` by domain.

    Raises:
        UserError: the mixture was not made of `dense`, or the statistics are of another model.
    """
    construction = read_construction(moe.path)
    if construction is None or not moe.model.is_moe:
        raise UserError(
            f"{moe.path} does not say how its experts were made",
            "name a mixture that partition or upcycle made, or a run that started from one",
        )
    if any(key.endswith("router.expert_bias") for key in moe.stored):
        raise UserError(
            f"{moe.path} was trained with moe_router_enable_expert_bias, whose routing the report "
            "does not know",
            "report on the mixture that the run started from",
        )
    sources = construction.get("sources") or [construction["source"]]
    name = fingerprint(dense)
    if name not in [source["fingerprint"] for source in sources]:
        names = ", ".join(source["name"] for source in sources)
        raise UserError(
            f"{moe.path} was not made of this dense model", f"it was made of {names}, unchanged"
        )
    if statistics is not None:
        statistics.check(name)
    model = moe.model
    total, active = count_parameters(model)
    maps = _neurons(construction, model)
    layers: list[dict[str, Any]] = []
    inputs = 0
    for layer in tqdm(model.moe_layers, desc="report", unit="layer"):
        row: dict[str, Any] = {
            "layer": layer,
            "score_scale": model.score_scale(layer),
            "overlap": measures.overlap(maps[layer]),
        }
        x = statistics.layer(layer).inputs if statistics is not None else None
        if x is not None and len(x):
            inputs = min(len(x), num_inputs)
            row |= _measure(moe, dense, layer, x[:inputs], "neurons" in construction)
        layers.append(row)
    shown = {key: construction[key] for key in ("method", "seed", "options", "router")}
    return {
        **shown,
        "sources": sources,
        "iteration": moe.iteration,
        "num_experts": model.num_experts,
        "moe_router_topk": model.moe_router_topk,
        "expert_width": model.expert_width,
        "shared_expert_width": model.moe_shared_expert_intermediate_size or 0,
        "parameters": {
            "dense": count_parameters(dense.model)[0],
            "total": total,
            "activated": active,
        },
        "inputs": inputs,
        "mean": {key: _mean(layers, key) for key in _MEANS if key in layers[0]},
        "perplexity": perplexity,
        "layers": layers,
    }


def _neurons(construction: dict[str, Any], model: ModelConfig) -> dict[int, Tensor]:
    """Where the experts' neurons came from, of every MoE layer; each source has its own numbers."""
    if "neurons" in construction:
        return {layer: map_.experts for layer, map_ in recorded_neurons(construction).items()}
    assert model.num_experts is not None
    granularity = construction["options"].get("granularity", 1)
    neurons = replica_map(model.ffn_hidden_size, granularity, model.num_experts)
    if construction["method"] == "branch_train_mix":
        base = construction["options"].get("base")
        share = model.num_experts // (len(construction["sources"]) - (base is not None))
        source = torch.arange(model.num_experts)[:, None] // share
        neurons = neurons + source * model.ffn_hidden_size
    elif construction["method"] == "upit":  # every expert is an FFN of its own
        neurons = neurons + torch.arange(model.num_experts)[:, None] * model.ffn_hidden_size
    return dict.fromkeys(model.moe_layers, neurons)


def _measure(
    moe: Weights, dense: Weights, layer: int, x: Tensor, partitioned: bool
) -> dict[str, Any]:
    moe, x = full_experts(moe), x.float()
    model = moe.model

    def weight(name: str, there: object = True) -> Tensor | None:
        return moe.tensor(layer_key(layer, name)) if there else None

    expected = measures.swiglu(x, *dense.gate_up(layer), dense.tensor(layer_key(layer, FC2)))
    shared = model.moe_shared_expert_intermediate_size or 0
    experts, topk, scale = model.num_experts, model.moe_router_topk, model.score_scale(layer)
    assert experts is not None
    routing = measures.Routing(topk, scale)
    if model.moe_shared_expert_gate == "xft":
        from megatron_ext.model.xft import xft_weights

        routing = measures.Routing(topk, scale, xft_weights)
    if partitioned:
        equal = measures.equal_weight(experts, model.expert_width, model.ffn_hidden_size, shared)
    else:  # a weighted mean of copies; the scale of k = 1 has made up for a choice's share of 1 / E
        equal = scale / experts / (experts if topk == 1 else 1)
    stored = measures.MoeLayer(
        router=moe.tensor(layer_key(layer, ROUTER)),
        fc1=moe.tensor(layer_key(layer, EXPERTS_FC1)),
        fc2=moe.tensor(layer_key(layer, EXPERTS_FC2)),
        router_out=weight(ROUTER_OUT, model.moe_gate == "mlp"),
        shared_fc1=weight(SHARED_FC1, shared),
        shared_fc2=weight(SHARED_FC2, shared),
    )
    found = measures.measure(x, expected, stored, routing, equal)
    return {
        "error": found.error,
        "error_all": found.error_all,
        "norm_ratio": found.norm_ratio,
        "imbalance": found.imbalance,
        "loads": found.loads,
    }


def _mean(layers: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in layers) / len(layers)


def read_perplexity(before: Path, after: Path) -> dict[str, dict[str, float]]:
    """Two outputs of tools/evaluate.py side by side, by domain.

    Raises:
        UserError: one is missing or damaged, or they are of different domains.
    """
    found = []
    for path in (before, after):
        try:
            values = json.loads(path.read_text())["perplexity"]
            found.append({str(name): float(value) for name, value in values.items()})
        except FileNotFoundError:
            raise UserError(f"losses {path} do not exist") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not what tools/evaluate.py prints ({error!r})",
                "write its standard output into a file",
            ) from None
    if found[0].keys() != found[1].keys():
        raise UserError(f"{before} and {after} are of different domains", "evaluate the same data")
    return {name: {"before": found[0][name], "after": found[1][name]} for name in found[0]}


def write(folder: Path, values: dict[str, Any]) -> None:
    """Write report.json, report.md and, where there are measurements, report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{NAME}.json", json.dumps(values, indent=2) + "\n")
    write_text(folder / f"{NAME}.md", markdown(values))
    if values["inputs"]:
        _draw(folder / f"{NAME}.png", values)


def markdown(values: dict[str, Any]) -> str:
    """The report as text."""
    options = {**values["options"], "router": values["router"]["init"]}
    parameters = values["parameters"]
    shared = values["shared_expert_width"]
    lines = [
        f"# {values['method']}, seed {values['seed']}",
        "",
        ", ".join(f"{name} {value}" for name, value in options.items()) + ".",
        "",
        f"{values['num_experts']} experts of width {values['expert_width']}, "
        f"{values['moe_router_topk']} chosen"
        + (f", beside a shared one of width {shared}" if shared else "")
        + f". Made of {', '.join(source['name'] for source in values['sources'])}.",
        "",
        *_table(
            ("parameters", "number"),
            [(name, f"{number:,}") for name, number in parameters.items()],
        ),
    ]
    if values["perplexity"]:
        pairs = [
            (name, f"{pair['before']:.2f}", f"{pair['after']:.2f}")
            for name, pair in values["perplexity"].items()
        ]
        lines += ["", *_table(("perplexity", "dense", "this model"), pairs)]
    columns = [name for name in _TITLES if name in values["layers"][0]]
    rows = [tuple(_cell(row[name]) for name in columns) for row in values["layers"]]
    rows.append(
        tuple(
            "mean" if name == "layer" else _cell(values["mean"].get(name, "")) for name in columns
        )
    )
    lines += ["", *_table(tuple(_TITLES[name] for name in columns), rows), ""]
    if values["inputs"]:
        lines += [
            f"On {values['inputs']:,} inputs of the dense model's FFNs in each layer. Error: norm "
            "of the difference to the dense FFN's output, over that output's norm, with the "
            "layer's router, choice and score scale; with all experts: each at equal weight. "
            "Norm ratio: norm of the output over the dense one's.",
            "",
            f"![Layer by layer]({NAME}.png)",
        ]
    else:
        lines.append("No inputs of the dense FFNs were given: nothing was computed with them.")
    lines += [
        "",
        "Overlap: Jaccard index of two experts' neurons (of the dense FFN that they were taken "
        "from), mean over all pairs.",
    ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(path: Path, values: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    layers: list[Mapping[str, Any]] = values["layers"]
    numbers = [row["layer"] for row in layers]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    errors, norms, loads = figure.subplots(1, 3)
    topk = values["moe_router_topk"]
    errors.set_title("relative error to the dense FFN")
    errors.plot(numbers, [row["error"] for row in layers], "o-", label=f"own router, k = {topk}")
    errors.plot(numbers, [row["error_all"] for row in layers], "s--", label="all experts")
    norms.set_title("norm over the dense FFN's")
    norms.axhline(1.0, color="grey", linewidth=1)
    norms.plot(numbers, [row["norm_ratio"] for row in layers], "o-", color="C2")
    loads.set_title("load of an expert over the mean")
    for expert in range(values["num_experts"]):
        shares = [row["loads"][expert] * values["num_experts"] for row in layers]
        loads.plot(numbers, shares, ".", color="C0", alpha=0.6)
    loads.axhline(1.0, color="grey", linewidth=1)
    for axes in (errors, norms, loads):
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    errors.legend()
    figure.suptitle(f"{values['method']}, seed {values['seed']}")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
