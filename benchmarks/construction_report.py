"""The report of the construction study: a table of the raw results, and a picture."""

import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from study_pictures import frame, save
from study_report import Results, claims_table, interval, write_generated

BASE = "independent_random"
OPTIONS = (
    *("steps", "seq_length", "global_batch_size", "micro_batch_size", "lr"),
    *("num_samples", "eval_samples"),
)
"""Options of the study that its results depend on."""
# What papers claim of pairs: the first should have the lower loss after training.
CLAIMS = (
    (BASE, "contiguous", "a random split is better than neurons in their order"),
    (
        BASE,
        "independent_clustering",
        "a random split is better than clusters of weights (LLaMA-MoE)",
    ),
    (BASE, "sharing_inner", "a random split is better than sharing neurons (LLaMA-MoE)"),
    (BASE, "sharing_inter", "a random split is better than a residual expert (LLaMA-MoE)"),
    ("gradient_split_plus", BASE, "LLaMA-MoE v2's split is better than a random one"),
    ("co_activation", BASE, "neurons that are active together belong together"),
    ("gradient", BASE, "neurons that matter to the same data belong together"),
    ("drop_upcycling", "copies", "copies must differ from the start (Drop-Upcycling)"),
    ("virtual_groups", "copies", "finer experts are better (virtual groups)"),
    ("xft", "copies", "a shared expert is better (XFT)"),
)


def write_report(folder: Path) -> Path:
    """Write construction.md and img/construction.svg beside construction.jsonl; returns the path
    of the first.
    """
    results = Results(folder / "construction.jsonl", "method", BASE)
    pictures = folder / "img"
    pictures.mkdir(exist_ok=True)
    _draw(pictures / "construction.svg", results)
    path = folder / "construction.md"
    title = "Twelve ways to make experts of one dense model"
    write_generated(path, title, "construction.jsonl", _body(results))
    return path


def _body(results: Results) -> list[str]:
    study = results.settings["study"]
    return [
        *_setting(results),
        *("", "## Perplexity before and after training", ""),
        "Of the mean held-out loss of the domains. Mean over seeds, with lowest to highest. The "
        f"difference is that of the held-out loss after training to `{BASE}` on the same seeds, "
        "with its 95 % t interval; negative is better.",
        *("", *_table(results, study["steps"]), ""),
        "![Before and after](img/construction.svg)",
        "",
        "*activated*: parameters that a token uses. *CPU*: seconds of the conversion without the "
        "check at its end and without collecting statistics; starting Python with torch and "
        "transformers is in it. *output error*: |y_moe - y_dense| / |y_dense| of the layers on "
        "real FFN inputs at step 0.",
        *("", "## What papers claim", "", *claims_table(results, CLAIMS)),
    ]


def _setting(results: Results) -> list[str]:
    study = results.settings["study"]
    runs = [run for seeds in results.runs.values() for run in seeds.values()]
    minutes = sum(run["train_cpu"] for run in runs) / 60
    tokens = study["steps"] * study["global_batch_size"] * study["seq_length"]
    options = " ".join(f"--{name.replace('_', '-')} {study[name]}" for name in OPTIONS)
    return [
        f'- **Command**: `make bench-construction ARGS="--model MODEL --data-dir TOKENS {options}"`'
        ", TOKENS being what `make demo` leaves in demo/tokens.",
        f"- **Model**: {study['model']}, {study['parameters'] / 1e6:.1f} million parameters. "
        "Mixtures have 8 experts of which a token uses 2; with a residual or shared expert 7 and "
        "1 beside it. Partitions keep the model's size and activate less of it; upcycled models "
        "are larger and activate more: compare the two kinds only with that in mind.",
        f"- **Budget**: {tokens:,} tokens ({study['steps']} steps of {study['global_batch_size']} "
        f"rows of {study['seq_length']}), AdamW, peak rate {study['lr']:g}, cosine. "
        f"Every model reads the same batches in the same order. {minutes:.0f} CPU minutes.",
        f"- **Data**: {', '.join(results.names)}; {study['eval_samples']} held-out rows of each "
        f"are evaluated, statistics are of {study['num_samples']} rows of each.",
        "- **Seeds**: of the construction and its routers.",
    ]


def _table(results: Results, steps: int) -> list[str]:
    dense = results.settings["dense"]
    lines = [
        "| method | seeds | total, activated (M) | CPU (s) | output error | at step 0 | "
        f"at step {steps} | difference |",
        "|---|---|---|---|---|---|---|---|",
        f"| the dense model | | {results.settings['study']['parameters'] / 1e6:.0f} | | | "
        f"{perplexity(dense['before']):.2f} | {perplexity(dense['loss']):.2f} | |",
    ]
    for method, seeds in results.runs.items():
        runs = list(seeds.values())
        size = f"{runs[0]['total'] / 1e6:.0f}, {runs[0]['activated'] / 1e6:.0f}"
        cells = [_spread([run[key] for run in runs]) for key in ("cpu", "error")]
        cells += [_spread([perplexity(run[key]) for run in runs]) for key in ("before", "loss")]
        found = None if method == BASE else results.difference(method)
        lines.append(
            f"| {method} | {len(runs)} | {size} | {' | '.join(cells)} | {interval(found)} |"
        )
    return lines


def perplexity(losses: dict[str, float]) -> float:
    """Of the mean loss of all domains."""
    return math.exp(statistics.fmean(losses.values()))


def _spread(values: list[float]) -> str:
    middle = _number(statistics.fmean(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _draw(path: Path, results: Results) -> None:
    """A line for each run, from its perplexity at step 0 to that after training."""
    names = list(results.runs)
    figure = Figure(figsize=(6.5, 0.34 * len(names) + 1.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for place, name in enumerate(names):
        runs = list(results.runs[name].values())
        for number, run in enumerate(runs):
            height = place + 0.16 * (number - (len(runs) - 1) / 2)
            before, after = perplexity(run["before"]), perplexity(run["loss"])
            axes.plot([before, after], [height, height], color="#bbbbbb", linewidth=1, zorder=1)
            axes.plot([before], [height], "o", color="#888888", markersize=3)
            axes.plot([after], [height], "o", color="#2e5f8d", markersize=4)
    dense = perplexity(results.settings["dense"]["loss"])
    axes.axvline(dense, color="#333333", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    frame(axes, "perplexity: grey at step 0, blue after training; line: the dense model trained")
    save(figure, path)
