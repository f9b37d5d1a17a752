"""Every way of making experts of one dense model: time, and perplexity before and after training.

    python benchmarks/construction.py --model DENSE --data-dir TOKENS --steps 200

DENSE is a Hugging Face directory, TOKENS is written by tools/preprocess_data.py (with held-out
text); by default both are what the demo leaves. Every mixture reads the same batches in the same
order; the seeds are of the construction and its routers. Interrupted? Start it again: what the
study's folder holds is not done twice, and --report-only writes the report of what there is.

8 experts, 2 chosen. Methods with a residual or shared expert have 7 and 1 beside it. Partitions
keep the size of the model; upcycled ones are larger and activate more, so compare the two
kinds only with the column of activated parameters in mind. branch_train_mix needs several
dense models and is left out.
"""

import dataclasses
import json
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from construction_report import OPTIONS, perplexity, write_report
from report import row, write
from stages import losses_of, step
from study_base import write_rows

from megatron_ext.checkpoint.layout import read_model_config
from megatron_ext.checkpoint.tensors import count_parameters
from megatron_ext.errors import UserError, run_main

Run = dict[str, Any]

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

    @property
    def inputs(self) -> str:
        """Statistics whose FFN inputs the output error is measured on."""
        return self.statistics or "hidden_8"


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

    model: Path = Path("demo/smollm2")
    """Dense model: Hugging Face directory, GGUF file or checkpoint."""
    data_dir: Path = Path("demo/tokens")
    """Tokenised domains: text for statistics, training and held-out losses."""
    work: Path = Path("results/construction")
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
    jobs: int = 1
    """Mixtures at a time; an upcycled one of SmolLM2-135M takes 9 GB."""
    keep: bool = False
    """Keep the checkpoints of finished mixtures."""
    report: Path | None = None
    """Folder of construction.md, construction.jsonl and its picture; none: WORK/report."""
    report_only: bool = False
    """Train nothing: write the report of REPORT/construction.jsonl again."""

    def run(self) -> None:
        folder = self.report or self.work / "report"
        if not self.report_only:
            self._check()
            self._study(folder)
        print(f"written: {write_report(folder)}")

    def _check(self) -> None:
        for name in ("model", "data_dir"):
            if not getattr(self, name).exists():
                raise UserError(
                    f"{name} {getattr(self, name)} does not exist", "make demo makes both defaults"
                )
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"there is no method {method}", f"methods: {', '.join(METHODS)}")
        if min(self.seeds, self.steps) < 1:
            raise UserError("seeds and steps must be at least 1")

    def _study(self, folder: Path) -> None:
        dense = self._dense()
        model = read_model_config(self.work / "dense" / "model")
        study = {name: getattr(self, name) for name in OPTIONS}
        study |= {"model": self.model.name, "parameters": count_parameters(model)[0]}
        settings = {"study": study, "dense": dense}
        for name in {METHODS[method].inputs for method in self.methods}:
            self._statistics(name)
        mixtures = [
            (method, seed)
            for method in self.methods
            for seed in range(1, (self.seeds if METHODS[method].seeded else 1) + 1)
        ]
        runs: list[Run] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            for run in pool.map(self._mixture, *zip(*mixtures, strict=True)):
                runs.append(run)
                write_rows(folder / "construction.jsonl", [settings, *runs])
        self._write_bench(dense, runs)

    def _dense(self) -> Run:
        """The dense model itself, trained alike."""
        folder = self.work / "dense"
        source, target = str(self.model.resolve()), str(folder / "model")
        convert = ("import", "--source", source, "--output", target, "--skip-verify")
        step(folder, "construct", "tools/convert_llama.py", convert)
        return self._train(folder, folder / "model")

    def _mixture(self, method: str, seed: int) -> Run:
        """One line of construction.jsonl."""
        entry = METHODS[method]
        folder = self.work / method / f"seed{seed}"
        moe, dense = folder / "model", self.work / "dense"
        command = [entry.command, "--source", str(self.model.resolve()), "--output", str(moe)]
        command += ["--method", method, "--seed", str(seed), "--skip-verify", *entry.options]
        if entry.statistics is not None:
            command += ["--statistics", str(self._statistics(entry.statistics))]
        done = step(folder, "construct", "tools/convert_llama.py", command)
        inputs = self._statistics(entry.inputs)
        trained = self._train(folder, moe)
        files = ("--dense-losses", str(dense / BEFORE), "--losses", str(folder / BEFORE))
        place = ("report", "--source", str(moe), "--dense", str(self.model.resolve()))
        more = ("--statistics", str(inputs), "--output", str(folder))
        step(folder, "measure", "tools/convert_llama.py", (*place, *more, *files))
        if not self.keep:  # what was measured stays
            shutil.rmtree(moe, ignore_errors=True)
        measured = json.loads((folder / "report.json").read_text())
        return {
            "method": method,
            "seed": seed,
            "cpu": done["cpu"],
            "activated": measured["parameters"]["activated"],
            "total": measured["parameters"]["total"],
            "error": measured["mean"]["error"],
            **trained,
        }

    def _train(self, folder: Path, model: Path) -> Run:
        """Held-out losses before and after the training, and its CPU seconds."""
        run = folder / "run"
        options = ["--load", str(model), "--save", str(run), "--seed", "1234", "--eval-at-start"]
        options += ["True", *self._data(), "--train-iters", str(self.steps), "--lr", str(self.lr)]
        options += ["--global-batch-size", str(self.global_batch_size)]
        options += ["--lr-warmup-iters", str(max(1, self.steps // 20))]
        trained = step(folder, "train", "pretrain_moe.py", options)
        for checkpoint in () if self.keep else run.glob("iter_*"):
            shutil.rmtree(checkpoint)
        losses = held_out_losses(run / "metrics.jsonl")
        by_domain = {name: perplexity({name: loss}) for name, loss in losses[0].items()}
        (folder / BEFORE).write_text(json.dumps({"perplexity": by_domain}) + "\n")
        return {"before": losses[0], "loss": losses[self.steps], "train_cpu": trained["cpu"]}

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

    def _write_bench(self, dense: Run, runs: list[Run]) -> None:
        rows = []
        for method in self.methods:
            found = [run for run in runs if run["method"] == method]
            time = statistics.median(run["cpu"] for run in found)
            rows.append(row(f"{method}: construction, CPU", "s", time, higher_is_better=False))
            for key, when in (("before", 0), ("loss", self.steps)):
                after = statistics.median(perplexity(run[key]) for run in found)
                limit = perplexity(dense[key])
                what = f"{method}: perplexity at step {when}"
                rows.append(row(what, "", after, limit=limit, higher_is_better=False))
        write("construction", rows)


def held_out_losses(metrics: Path) -> dict[int, dict[str, float]]:
    """Held-out loss of each domain, at each step where a run evaluated."""
    records = map(json.loads, metrics.read_text().splitlines())
    return {row["step"]: losses_of(row) for row in records if row["kind"] == "valid"}


def main() -> None:
    study: Study = tyro.cli(Study, description=__doc__)
    dataclasses.replace(study, work=study.work.resolve()).run()


if __name__ == "__main__":
    run_main(main)
