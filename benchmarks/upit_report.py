"""The report of the UpIT study: tables of the raw results, and pictures.

`upit.md` has one generated part, between two comments; what is written around it by hand stays.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mixing_pictures import draw_differences, save
from paired import Difference, paired

from megatron_ext.errors import UserError
from megatron_ext.files import written_whole

Row = dict[str, Any]
BEGIN, END = "<!-- generated from upit.jsonl: begin -->", "<!-- generated: end -->"
BASE = "upcycling"
# What the paper claims of pairs: the first should have the lower loss.
CLAIMS = (
    ("upit", "dense", "a mixture is better than the dense model on the same tokens"),
    ("upit", "upcycling", "checkpoints are better experts than copies"),
    ("upit", "no_router_init", "routers should be trained first"),
    ("upit", "random_seed_data", "on data that each expert is best at"),
    ("no_router_init", "random_seed_data", "no training at all beats one on random data"),
    ("upit", "no_expansion", "merged experts are as good as real ones"),
    ("upit", "random_parents", "the least alike make the best parents"),
    ("upit_half", "upcycling", "half of the data is enough"),
)


def write_report(folder: Path) -> Path:
    """Write upit.md and img/upit_*.svg beside upit.jsonl; returns the path of the first.

    Raises:
        UserError: there are no results.
    """
    path = folder / "upit.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist", "run the study first")
    settings, *rows = (json.loads(line) for line in path.read_text().splitlines())
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        runs.setdefault(row["variant"], {})[row["seed"]] = row
    names = list(rows[0]["loss"])
    pictures = folder / "img"
    pictures.mkdir(exist_ok=True)
    others = [name for name in runs if name != BASE]
    columns = [None, *names]
    cells = {(v, name): _difference(runs, v, BASE, name) for v in others for name in columns}
    draw_differences(pictures / "upit_differences.svg", others, columns, cells, BASE)
    _draw_loads(pictures / "upit_loads.svg", names, runs)
    report = folder / "upit.md"
    before, after = "# UpIT and its parts\n\n", ""
    if report.is_file():
        before, found, rest = report.read_text().partition(BEGIN)
        after = rest.partition(END)[2] if found else ""
    body = [
        *_setting(settings, rows),
        *("", "## Held-out loss", ""),
        "Nats per trained token, the mean of the data sets; the same tokens for all but the "
        f"variants with `half`. Differences are to `{BASE}` on the same seeds, with 95 % t "
        "intervals; negative is better.",
        *("", *_table(runs, names, cells), ""),
        "![Differences](img/upit_differences.svg)",
        *("", *_claims(runs), ""),
        *("## Routers", "", *_routers(runs), ""),
        *("![Loads](img/upit_loads.svg)", ""),
        *_spread(runs),
    ]
    text = "\n".join([BEGIN, "", *body, "", END])
    with written_whole(report) as partial:
        partial.write_text(f"{before}{text}{after or chr(10)}")
    return report


def _losses(runs: Mapping[str, Mapping[int, Row]], name: str, of: str | None) -> dict[int, float]:
    """By seed: of one data set, or the mean of all."""
    return {
        seed: run["loss"][of] if of else statistics.fmean(run["loss"].values())
        for seed, run in runs[name].items()
    }


def _difference(
    runs: Mapping[str, Mapping[int, Row]], first: str, second: str, of: str | None = None
) -> Difference | None:
    """None where the two have no seed in common."""
    if first not in runs or second not in runs or not runs[first].keys() & runs[second].keys():
        return None
    return paired(_losses(runs, first, of), _losses(runs, second, of))


def _setting(settings: Row, rows: list[Row]) -> list[str]:
    study, base, data = (settings[part] for part in ("study", "base", "data"))
    tokens = study["steps"] * study["global_batch_size"] * base["seq_length"]
    trained = base["dense_iters"] * base["global_batch_size"] * base["seq_length"]
    quick = " --quick" if study["quick"] else ""
    sizes = ", ".join(f"{name} {found['train']['documents']:,}" for name, found in data.items())
    return [
        '- **Command**: `make bench-upit_study ARGS="--data-dir TALKS --pretrain-dir TEXT'
        f'{quick}"`, TALKS and TEXT being folders with a .jsonl file for each name below.',
        f"- **Model**: LLaMA of {base['num_layers']} layers, width {base['hidden_size']}, FFN "
        f"{base['ffn_hidden_size']}, vocabulary {base['vocab_size']}, trained for {trained:,} "
        f"tokens of {', '.join(base['domains'])}. Mixtures have 8 experts of that FFN's size, a "
        "token uses 2.",
        f"- **Budget**: {tokens:,} positions ({study['steps']} steps of "
        f"{study['global_batch_size']} packed rows of {base['seq_length']}) for every variant, "
        "half of them with `half`. UpIT spends half of its budget on the dense run. What routers "
        f"are trained on first ({study['seed_fraction']:.0%} of the conversations) is not counted. "
        f"Each run: AdamW, peak rate {study['lr']:g}, cosine to 0.",
        f"- **Data**: {sizes} conversations, data sets equally often, vicuna_v1.1 template, loss "
        f"on answers; {study['eval_samples']} held-out rows of each are evaluated.",
        f"- **Seeds**: {', '.join(map(str, study['seeds']))}: of sample order, merged experts, "
        f"routers and seed data. {sum(row['cpu'] for row in rows) / 60:.0f} CPU minutes of tuning "
        "beside the dense runs.",
        "",
        "`upit`: 4 checkpoints and 4 merged experts (DARE of the least alike), routers trained on "
        "data bucketed by perplexity. `no_expansion`: 8 checkpoints. `random_seed_data`: data "
        "bucketed at random. `upcycling`: 8 copies of the model before tuning.",
    ]


def _table(
    runs: Mapping[str, Mapping[int, Row]],
    names: list[str],
    cells: Mapping[tuple[str, str | None], Difference | None],
) -> list[str]:
    lines = [
        f"| variant | seeds | loss | difference | {' | '.join(names)} |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for variant, seeds in runs.items():
        mean = statistics.fmean(_losses(runs, variant, None).values())
        each = (statistics.fmean(_losses(runs, variant, name).values()) for name in names)
        found = _interval(cells.get((variant, None)))
        losses = " | ".join(f"{loss:.4f}" for loss in each)
        lines.append(f"| {variant} | {len(seeds)} | {mean:.4f} | {found} | {losses} |")
    return lines


def _claims(runs: Mapping[str, Mapping[int, Row]]) -> list[str]:
    lines = ["| claim | compared | difference | verdict |", "|---|---|---|---|"]
    for first, second, claim in CLAIMS:
        if found := _difference(runs, first, second):
            verdict = {-1: "holds here", 0: "cannot be told", 1: "the reverse here"}[found.sign]
            lines.append(f"| {claim} | {first} - {second} | {_interval(found)} | {verdict} |")
    return lines


def _routers(runs: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """How often a router sends a bucket's held-out tokens to the bucket's expert."""
    lines = [
        "Tokens of held-out seed samples that the router sends to their bucket's expert: as the "
        "first choice, and among the two.",
        "",
        "| variant | before | after | chance |",
        "|---|---|---|---|",
    ]
    for variant, seeds in runs.items():
        found = [run["router"] for run in seeds.values() if "after" in run.get("router", {})]
        if found:
            moments = (
                _shares([r[moment]["mean"] for r in found]) for moment in ("before", "after")
            )
            chance = ", ".join(f"{share:.1%}" for share in found[0]["chance"])
            lines.append(f"| {variant} | {' | '.join(moments)} | {chance} |")
    return lines


def _shares(pairs: list[list[float]]) -> str:
    return ", ".join(f"{statistics.fmean(column):.1%}" for column in zip(*pairs, strict=True))


def _spread(runs: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """How differently the data sets use the experts of the last layer after tuning."""
    lines = [
        "Mean distance (l2) between two data sets' loads of the last layer's experts, after the "
        "tuning, mean over seeds:",
        "",
    ]
    for variant, seeds in runs.items():
        found = [_mean_distance(run["loads"]) for run in seeds.values() if "loads" in run]
        if found:
            lines.append(f"- `{variant}`: {statistics.fmean(found):.3f}")
    return lines


def _mean_distance(loads: Mapping[str, list[float]]) -> float:
    return statistics.fmean(math.dist(a, b) for a, b in itertools.combinations(loads.values(), 2))


def _draw_loads(path: Path, names: list[str], runs: Mapping[str, Mapping[int, Row]]) -> None:
    """Loads of the last layer by data set, a panel for each mixture: of one seed, since experts
    have no common order from seed to seed.
    """
    first = {name: next(iter(seeds.values())) for name, seeds in runs.items()}
    shown = [name for name, run in first.items() if "loads" in run]
    columns = min(4, max(1, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(2.6 * columns, 1.6 * lines + 0.4), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, variant in zip(panels, shown, strict=False):
        loads = [first[variant]["loads"][name] for name in names]
        mesh = axes.pcolormesh(loads, cmap="Blues", vmin=0)
        axes.set_yticks([n + 0.5 for n in range(len(names))], names, fontsize=7)
        axes.set_xticks([])
        axes.set_title(variant, fontsize=8)
        figure.colorbar(mesh, ax=axes)
    save(figure, path)


def _interval(found: Difference | None) -> str:
    if found is None:
        return "-"
    if found.pairs < 2:
        return f"{found.mean:+.4f} [one seed]"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
