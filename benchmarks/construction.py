"""Every way of making experts of one dense model: time, and perplexity before and after training.

    python benchmarks/construction.py --model DENSE --data-dir TOKENS --work STUDY --steps 200

DENSE is a Hugging Face directory, TOKENS is written by tools/preprocess_data.py (with held-out
text). Every mixture reads the same batches in the same order; the seeds are of the construction and
its routers. Interrupted? Start it again: what STUDY holds is not done twice.

8 experts, 2 chosen. Methods with a residual or shared expert have 7 and 1 beside it. Partitions
keep the size of the model; upcycled ones are larger and activate more, so compare the two
kinds only with the column of activated parameters in mind. branch_train_mix needs several
dense models and is left out.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from report import RESULTS, Row, row, write
from stages import losses_of, step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_ext.errors import UserError, run_main  # noqa: E402

BEFORE = "before.out"
"""Held-out losses before the training, as tools/evaluate.py prints them."""

EIGHT: tuple[str, ...] = ("--num-experts", "8", "--moe-router-topk", "2")
SEVEN: tuple[str, ...] = ("--num-experts", "7", "--moe-router-topk", "1")
# What tools/collect_statistics.py groups text by, and into how many groups.
STATISTICS = {
    "hidden_8": ("--groups", "hidden", "--num-clusters", "8"),
    "hidden_7": ("--groups", "hidden", "--num-clusters", "7"),
    "centroids_7": ("--groups", "centroids", "--num-clusters", "7"),
}


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    command: Literal["partition", "upcycle"]
    options: tuple[str, ...] = EIGHT
    statistics: str | None = None
    seeded: bool = True
    """Whether neurons, copies or routers are drawn at random."""


METHODS = {
    "independent_random": Entry("partition"),
    "contiguous": Entry("partition"),
    "independent_clustering": Entry("partition"),
    "co_activation": Entry("partition", statistics="hidden_8"),
    "gradient": Entry("partition", statistics="hidden_8"),
    "sharing_inner": Entry("partition", statistics="hidden_8"),
    "sharing_inter": Entry("partition", SEVEN, "hidden_7"),
    "gradient_split_plus": Entry("partition", SEVEN, "centroids_7", seeded=False),
    "copies": Entry("upcycle"),
    "virtual_groups": Entry("upcycle", (*EIGHT, "--granularity", "2")),
    "drop_upcycling": Entry("upcycle"),
    "xft": Entry("upcycle", SEVEN),
}


@dataclass
class Study:
    """Build, evaluate, train and evaluate a mixture with every method."""

    model: Path
    """Dense model: Hugging Face directory, GGUF file or checkpoint."""
    data_dir: Path
    """Tokenised domains: text for statistics, training and held-out losses."""
    work: Path
    """Folder of the study; a study found there goes on."""
    statistics: Path | None = None
    """Folder with statistics of this model in hidden_8, hidden_7 and centroids_7; none: those that
    are needed are collected in the study's folder.
    """
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Methods of the table."""
    seeds: int = 3
    """Seeds of each method that draws anything."""
    steps: int = 200
    """Training steps."""
    seq_length: int = 256
    """Tokens in a sample."""
    global_batch_size: int = 8
    """Samples in a step."""
    micro_batch_size: int = 4
    """Samples in a forward pass."""
    lr: float = 2e-4
    """Peak learning rate."""
    num_samples: int = 64
    """Samples of each domain that statistics are collected from."""
    eval_samples: int = 64
    """Held-out samples of each domain."""
    keep: bool = False
    """Keep the checkpoints of finished mixtures."""

    def run(self) -> None:
        for name in ("model", "data_dir"):
            if not getattr(self, name).exists():
                raise UserError(f"{name} {getattr(self, name)} does not exist")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"there is no method {method}", f"methods: {', '.join(METHODS)}")
        if min(self.seeds, self.steps) < 1:
            raise UserError("seeds and steps must be at least 1")
        dense = self._dense()
        results = {method: self._method(method) for method in self.methods}
        self._report(dense, results)

    def _dense(self) -> dict[str, Any]:
        """The dense model itself, trained alike."""
        folder = self.work / "dense"
        source, target = str(self.model.resolve()), str(folder / "model")
        convert = ("import", "--source", source, "--output", target, "--skip-verify")
        step(folder, "construct", "tools/convert_llama.py", convert)
        return self._train(folder, folder / "model")

    def _method(self, method: str) -> list[dict[str, Any]]:
        entry = METHODS[method]
        seeds = range(1, (self.seeds if entry.seeded else 1) + 1)
        return [self._mixture(method, entry, seed) for seed in seeds]

    def _mixture(self, method: str, entry: Entry, seed: int) -> dict[str, Any]:
        folder = self.work / method / f"seed{seed}"
        moe, dense = folder / "model", self.work / "dense"
        command = [entry.command, "--source", str(self.model.resolve()), "--output", str(moe)]
        command += ["--method", method, "--seed", str(seed), "--skip-verify", *entry.options]
        if entry.statistics is not None:
            command += ["--statistics", str(self._statistics(entry.statistics))]
        done = step(folder, "construct", "tools/convert_llama.py", command)
        inputs = self._statistics(entry.statistics or "hidden_8")
        trained = self._train(folder, moe)
        files = ("--dense-losses", str(dense / BEFORE), "--losses", str(folder / BEFORE))
        place = ("report", "--source", str(moe), "--dense", str(self.model.resolve()))
        more = ("--statistics", str(inputs), "--output", str(folder))
        step(folder, "measure", "tools/convert_llama.py", (*place, *more, *files))
        if not self.keep:  # what was measured stays
            shutil.rmtree(moe, ignore_errors=True)
        measured = json.loads((folder / "report.json").read_text())
        return {
            "seed": seed,
            "cpu": done["cpu"],
            "wall": done["wall"],
            "activated": measured["parameters"]["activated"],
            "total": measured["parameters"]["total"],
            "error": measured["mean"]["error"],
            **trained,
        }

    def _train(self, folder: Path, model: Path) -> dict[str, Any]:
        """Perplexity before and after the training."""
        run = folder / "run"
        options = ["--load", str(model), "--save", str(run), "--seed", "1234", "--eval-at-start"]
        options += ["True", *self._data(), "--train-iters", str(self.steps), "--lr", str(self.lr)]
        options += ["--global-batch-size", str(self.global_batch_size)]
        options += ["--lr-warmup-iters", str(max(1, self.steps // 20))]
        step(folder, "train", "pretrain_moe.py", options)
        for checkpoint in () if self.keep else run.glob("iter_*"):
            shutil.rmtree(checkpoint)
        losses = held_out_losses(run / "metrics.jsonl")
        perplexities = {name: math.exp(loss) for name, loss in losses[0].items()}
        (folder / BEFORE).write_text(json.dumps({"perplexity": perplexities}) + "\n")
        before, after = (math.exp(statistics.fmean(losses[at].values())) for at in (0, self.steps))
        return {"before": before, "after": after}

    def _data(self) -> list[str]:
        return [
            *("--data-dir", str(self.data_dir.resolve()), "--seq-length", str(self.seq_length)),
            *("--micro-batch-size", str(self.micro_batch_size)),
            *("--eval-samples", str(self.eval_samples), "--progress", "False"),
        ]

    def _statistics(self, name: str) -> Path:
        if self.statistics is not None:
            return (self.statistics / name).resolve()
        folder = self.work / "statistics"
        command = ["--load", str(self.work / "dense" / "model"), "--output", str(folder / name)]
        command += ["--data-dir", str(self.data_dir.resolve()), *STATISTICS[name]]
        command += ["--num-samples", str(self.num_samples), "--seq-length", str(self.seq_length)]
        step(folder, f"collect_{name}", "tools/collect_statistics.py", command)
        return folder / name

    def _report(self, dense: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
        rows: list[Row] = []
        for method, runs in results.items():
            many = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
            figures = (
                ("construction, CPU", "s", "cpu", None),
                ("perplexity at step 0", "", "before", dense["before"]),
                (f"perplexity at step {self.steps}", "", "after", dense["after"]),
            )
            for metric, unit, key, limit in figures:
                middle = statistics.median(run[key] for run in runs)
                what = f"{method}, {many}: {metric}"
                rows.append(row(what, unit, middle, limit=limit, higher_is_better=False))
        write("construction", rows)
        table = RESULTS / "construction.md"
        partial = table.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(self._markdown(dense, results))
        os.replace(partial, table)
        print(f"\n{table.read_text()}\nwritten to {table}")

    def _markdown(self, dense: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
        tokens = self.steps * self.global_batch_size * self.seq_length
        lines = [
            f"Experts made of {self.model.name}, trained for {self.steps} steps ({tokens:,} tokens "
            f"of {self.data_dir.name}, learning rate {self.lr}). Mean over seeds, with lowest to "
            "highest. Perplexity: of the mean held-out loss of the domains. Output error: of the "
            "layers against the dense FFNs (`convert_llama.py report`). Time: CPU seconds of the "
            "conversion, without collecting statistics and without the check at the end.",
            "",
            "| method | seeds | parameters (M), activated (M) | CPU s | output error | "
            f"perplexity at step 0 | at step {self.steps} |",
            "|---|---|---|---|---|---|---|",
            f"| dense | - | - | - | 0 | {dense['before']:.2f} | {dense['after']:.2f} |",
        ]
        for method, runs in results.items():
            size = f"{runs[0]['total'] / 1e6:.1f}, {runs[0]['activated'] / 1e6:.1f}"
            cells = [_spread([run[key] for run in runs]) for key in ("cpu", "error")]
            cells += [_spread([run[key] for run in runs]) for key in ("before", "after")]
            lines.append(f"| {method} | {len(runs)} | {size} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def held_out_losses(metrics: Path) -> dict[int, dict[str, float]]:
    """Held-out loss of each domain, at each step where a run evaluated."""
    records = map(json.loads, metrics.read_text().splitlines())
    return {row["step"]: losses_of(row) for row in records if row["kind"] == "valid"}


def _spread(values: list[float]) -> str:
    middle = f"{statistics.fmean(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g}-{max(values):.4g})"


def main() -> None:
    study: Study = tyro.cli(Study, description=__doc__)
    dataclasses.replace(study, work=study.work.resolve()).run()


if __name__ == "__main__":
    run_main(main)
