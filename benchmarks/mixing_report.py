"""The report of the mixing study: tables and sentences of the raw results, and pictures."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from mixing_pictures import draw_decisions, draw_weights
from paired import Difference
from study_pictures import draw_differences
from study_report import Results, claims_table, interval, trained_on, write_generated

BASE = "uniform"
# What the papers claim of pairs: the first should have the lower loss.
CLAIMS = (
    ("router_load", "final_static", "changing weights beat their own end result from the start"),
    ("router_load", "gate_load_static", "measuring again beats measuring once"),
    ("router_load", "inverse", "distant data sets are the ones to raise"),
    ("router_load", "random", "any change would not do as well"),
    ("router_load", "reference_loss", "loads tell more than losses"),
    ("load_progress", "router_load", "our rule beats the paper's"),
)


def write_report(folder: Path) -> Path:
    """Write mixing.md and img/mixing_*.svg beside mixing.jsonl; returns the path of the first."""
    results = Results(folder / "mixing.jsonl", "strategy", BASE)
    pictures = folder / "img"
    pictures.mkdir(exist_ok=True)
    draw_differences(pictures / "mixing_differences.svg", results)
    draw_weights(pictures / "mixing_weights.svg", results.names, results.runs)
    draw_decisions(pictures / "mixing_decisions.svg", results.names, results.runs)
    path = folder / "mixing.md"
    write_generated(path, "Mixing strategies compared", "mixing.jsonl", _body(results))
    return path


def _body(results: Results) -> list[str]:
    return [
        "## What was run",
        "",
        *_setting(results),
        "",
        "## Held-out loss",
        "",
        "Nats per trained token, the mean of the data sets. Differences are to `uniform` on the "
        "same seeds, with 95 % t intervals; negative is better. The losses are means over each "
        "strategy's own seeds, so where seeds are fewer only the difference can be compared.",
        "",
        *_main_table(results),
        "",
        "![Differences to uniform](img/mixing_differences.svg)",
        "",
        *(_sentence(name, results.cells[name, None]) for name in results.others),
        "",
        "### By data set",
        "",
        *_data_table(results),
        "",
        "### Strategy against strategy",
        "",
        *claims_table(results, CLAIMS),
        "",
        "## Weights, loads and distances",
        "",
        *_weights_table(results),
        "",
        "![Weights](img/mixing_weights.svg)",
        "",
        "Mean over seeds; the shade goes from the lowest to the highest seed.",
        "",
        "![Loads and distances](img/mixing_decisions.svg)",
        "",
        *_distances(results),
    ]


def _setting(results: Results) -> list[str]:
    study, base, data = (results.settings[part] for part in ("study", "base", "data"))
    rows = study["steps"] * study["global_batch_size"]
    tokens = rows * base["seq_length"]
    runs = [run for seeds in results.runs.values() for run in seeds.values()]
    minutes = sum(run["cpu"] for run in runs) / 60
    lines = [
        '- **Command**: `make bench-mixing_study ARGS="--data-dir TALKS --pretrain-dir TEXT'
        f'{"" if not study["quick"] else " --quick"}"`, TALKS and TEXT being folders with a .jsonl '
        "file for each name below.",
        f"- **Runs**: {len(runs)} of {study['steps']} steps of {study['global_batch_size']} packed "
        f"rows of {base['seq_length']} tokens ({tokens:,} positions each; trained tokens below), "
        f"a decision every {study['interval']} steps, AdamW with peak rate {study['lr']:g}, "
        f"cosine to 0. {minutes:.0f} CPU minutes in all, {60 * minutes / len(runs):.0f} s a run.",
        f"- **Model**: LLaMA of {base['num_layers']} layers, width {base['hidden_size']}, "
        f"vocabulary {base['vocab_size']}, trained for {trained_on(base, 'dense_iters')} tokens of "
        f"{', '.join(base['domains'])}; every FFN cut into {base['num_experts']} experts of which "
        f"a token uses {base['moe_router_topk']} (independent_random), trained for "
        f"{trained_on(base, 'moe_iters')} more. Each seed has its own cut, routers, sample order "
        "and gate noise. Routers are frozen while tuning; gate noise and the CV² balance loss "
        "(0.01) are on.",
        "- **Data**: vicuna_v1.1 template, loss on answers, a tenth held out by a hash of the "
        f"text, of which {study['eval_samples']} packed rows of each data set are evaluated.",
        "",
        "| data set | conversations | tokens | trained | held out | cut to length |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in data.items():
        train, held_out = found["train"], found["valid"]
        share = train["trained_tokens"] / train["tokens"]
        lines.append(
            f"| {name} | {train['documents']:,} | {train['tokens']:,} | {share:.0%} | "
            f"{held_out['documents']:,} | {found['cut']:,} |"
        )
    return lines


def _main_table(results: Results) -> list[str]:
    lines = [
        "| strategy | seeds | loss | difference to uniform | lower in | trained tokens |",
        "|---|---|---|---|---|---|",
    ]
    for strategy, runs in results.runs.items():
        tokens = statistics.fmean(run["trained_tokens"] for run in runs.values())
        found = results.cells.get((strategy, None))
        where = f"{found.below} of {found.pairs}" if found else "-"
        lines.append(
            f"| {strategy} | {len(runs)} | {results.mean(strategy):.4f} | {interval(found)} | "
            f"{where} | {tokens:,.0f} |"
        )
    return lines


def _data_table(results: Results) -> list[str]:
    level = (results.mean(BASE, name) for name in results.names)
    lines = [
        f"| | {' | '.join(results.names)} |",
        "|---|" + "---|" * len(results.names),
        f"| {BASE}: loss | {' | '.join(f'{loss:.4f}' for loss in level)} |",
    ]
    for strategy in results.others:
        row = (interval(results.cells[strategy, name]) for name in results.names)
        lines.append(f"| {strategy} | {' | '.join(row)} |")
    return lines


def _weights_table(results: Results) -> list[str]:
    lines = [
        "Weights after the last decision, mean (lowest to highest seed):",
        "",
        f"| | {' | '.join(results.names)} |",
        "|---|" + "---|" * len(results.names),
    ]
    for strategy, runs in results.runs.items():
        last = [run["decisions"][-1]["weights"] for run in runs.values() if run["decisions"]]
        if last:
            row = (_range([weights[name] for weights in last]) for name in results.names)
            lines.append(f"| {strategy} | {' | '.join(row)} |")
    return lines


def _distances(results: Results) -> list[str]:
    """How far apart the loads are, at the first and at the last decision of router_load."""
    lines = []
    for place, when in ((0, "first"), (-1, "last")):
        runs = results.runs.get("router_load", {}).values()
        taken = [run["decisions"][place]["distance"] for run in runs if run["decisions"]]
        if taken:
            each = (f"{name} {_range([d[name] for d in taken])}" for name in results.names)
            lines.append(f"- Delta of `router_load` at the {when} decision: {', '.join(each)}.")
    return lines


def _sentence(strategy: str, found: Difference | None) -> str:
    if found is None:
        return f"- `{strategy}` shares no seed with `{BASE}`."
    verdict = {-1: "better than", 0: "cannot be told from", 1: "worse than"}[found.sign]
    return f"- `{strategy}` {verdict} `{BASE}`: {interval(found)}, {found.pairs} seeds."


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
