"""The report of the UpIT study: tables of the raw results, and pictures."""

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from study_pictures import draw_differences, panels, save
from study_report import Results, claims_table, interval, trained_on, write_generated

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
    """Write upit.md and img/upit_*.svg beside upit.jsonl; returns the path of the first."""
    results = Results(folder / "upit.jsonl", "variant", BASE)
    pictures = folder / "img"
    pictures.mkdir(exist_ok=True)
    draw_differences(pictures / "upit_differences.svg", results)
    _draw_loads(pictures / "upit_loads.svg", results)
    path = folder / "upit.md"
    write_generated(path, "UpIT and its parts", "upit.jsonl", _body(results))
    return path


def _body(results: Results) -> list[str]:
    return [
        *_setting(results),
        *("", "## Held-out loss", ""),
        "Nats per trained token, the mean of the data sets; the same tokens for all but the "
        f"variants with `half`. Differences are to `{BASE}` on the same seeds, with 95 % t "
        "intervals; negative is better.",
        *("", *_table(results), ""),
        "![Differences](img/upit_differences.svg)",
        *("", *claims_table(results, CLAIMS), ""),
        *("## Routers", "", *_routers(results), ""),
        *("![Loads](img/upit_loads.svg)", ""),
        *_spread(results),
    ]


def _setting(results: Results) -> list[str]:
    study, base, data = (results.settings[part] for part in ("study", "base", "data"))
    minutes = sum(run["cpu"] for seeds in results.runs.values() for run in seeds.values()) / 60
    tokens = study["steps"] * study["global_batch_size"] * base["seq_length"]
    quick = " --quick" if study["quick"] else ""
    sizes = ", ".join(f"{name} {found['train']['documents']:,}" for name, found in data.items())
    return [
        '- **Command**: `make bench-upit_study ARGS="--data-dir TALKS --pretrain-dir TEXT'
        f'{quick}"`, TALKS and TEXT being folders with a .jsonl file for each name below.',
        f"- **Model**: LLaMA of {base['num_layers']} layers, width {base['hidden_size']}, FFN "
        f"{base['ffn_hidden_size']}, vocabulary {base['vocab_size']}, trained for "
        f"{trained_on(base, 'dense_iters')} "
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
        f"routers and seed data. {minutes:.0f} CPU minutes of tuning "
        "beside the dense runs.",
        "",
        "`upit`: 4 checkpoints and 4 merged experts (DARE of the least alike), routers trained on "
        "data bucketed by perplexity. `no_expansion`: 8 checkpoints. `random_seed_data`: data "
        "bucketed at random. `upcycling`: 8 copies of the model before tuning.",
    ]


def _table(results: Results) -> list[str]:
    names = results.names
    lines = [
        f"| variant | seeds | loss | difference | {' | '.join(names)} |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for variant, seeds in results.runs.items():
        found = interval(results.cells.get((variant, None)))
        mean, *each = (f"{results.mean(variant, column):.4f}" for column in (None, *names))
        lines.append(f"| {variant} | {len(seeds)} | {mean} | {found} | {' | '.join(each)} |")
    return lines


def _routers(results: Results) -> list[str]:
    """How often a router sends a bucket's held-out tokens to the bucket's expert."""
    lines = [
        "Tokens of held-out seed samples that the router sends to their bucket's expert: as the "
        "first choice, and among the two.",
        "",
        "| variant | before | after | chance |",
        "|---|---|---|---|",
    ]
    for variant, seeds in results.runs.items():
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


def _spread(results: Results) -> list[str]:
    """How differently the data sets use the experts of the last layer after tuning."""
    lines = [
        "Mean distance (l2) between two data sets' loads of the last layer's experts, after the "
        "tuning, mean over seeds:",
        "",
    ]
    for variant, seeds in results.runs.items():
        found = [_mean_distance(run["loads"]) for run in seeds.values() if "loads" in run]
        if found:
            lines.append(f"- `{variant}`: {statistics.fmean(found):.3f}")
    return lines


def _mean_distance(loads: Mapping[str, list[float]]) -> float:
    return statistics.fmean(math.dist(a, b) for a, b in itertools.combinations(loads.values(), 2))


def _draw_loads(path: Path, results: Results) -> None:
    """Loads of the last layer by data set, a panel for each mixture: of one seed, since experts
    have no common order from seed to seed.
    """
    first = {name: next(iter(seeds.values())) for name, seeds in results.runs.items()}
    shown = [name for name, run in first.items() if "loads" in run]
    figure, places = panels(len(shown), 1.6)
    for axes, variant in zip(places, shown, strict=False):
        loads = [first[variant]["loads"][name] for name in results.names]
        mesh = axes.pcolormesh(loads, cmap="Blues", vmin=0)
        axes.set_yticks([n + 0.5 for n in range(len(loads))], results.names, fontsize=7)
        axes.set_xticks([])
        axes.set_title(variant, fontsize=8)
        figure.colorbar(mesh, ax=axes)
    save(figure, path)
