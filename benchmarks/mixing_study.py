"""Does mixing by router loads help? MoE-SFT's table of strategies, with seeds and intervals.

    python benchmarks/mixing_study.py --data-dir TALKS --pretrain-dir TEXT

TALKS and TEXT hold a .jsonl file for each data set (conversations; {"text"}); without them the
demo's are taken, which pip brings. A dense LLaMA is trained on TEXT; for every seed it is cut into
experts and trained on, and that MoE is tuned by finetune_moe.py with every strategy. Runs of a seed
share the model, the order of each data set's samples and the gate noise, so strategies are compared
in pairs. Interrupted? Start it again: what is finished is not done twice, and --report-only writes
the report of what there is.

--quick takes a few minutes: three strategies, two seeds, short runs of a barely trained model. It
shows that everything works, and nothing else.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixing_report import write_report  # noqa: E402
from stages import losses_of, step  # noqa: E402
from study_base import Base, folders, tune, write_rows  # noqa: E402

from megatron_ext.errors import UserError, run_main  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A strategy of the table."""

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None
    """Strategy whose run of the same seed it needs."""
    initial: Literal["gate_load", "embedding"] | None = None
    """Initial weights from tools/static_weights.py, of the model before tuning."""


PAPER = {"eta": 10.0, "c": 0.05}
MAIN = {
    "uniform": Entry("uniform"),
    "router_load": Entry("router_load", PAPER),
    "load_progress": Entry("load_progress"),
    "reference_loss": Entry("reference_loss", after="uniform"),
}
BASELINES = {
    "data_size": Entry("data_size"),
    "sequential": Entry("sequential"),
}
OTHERS = {
    "random": Entry("random"),
    "final_static": Entry("static", after="router_load"),
    "inverse": Entry("inverse", PAPER),
    "gate_load_static": Entry("static", initial="gate_load"),
    "embedding_static": Entry("static", initial="embedding"),
    "router_load_from_embedding": Entry("router_load", PAPER, initial="embedding"),
}
STRATEGIES = {**MAIN, **BASELINES, **OTHERS}


@dataclass
class Study:
    """Tune a small LLaMA-MoE with every mixing strategy and compare held-out losses in pairs."""

    data_dir: Path | None = None
    """Conversations: a .jsonl file for each data set, at least 3; none: the demo's."""
    pretrain_dir: Path | None = None
    """Text the model is made of: a .jsonl file for each domain; none: the demo's."""
    work: Path = Path("results/mixing_study")
    """Folder of the study; a study found there goes on."""
    report: Path | None = None
    """Folder of mixing.md, mixing.jsonl and pictures; none: WORK/report."""
    report_only: bool = False
    """Train nothing: write the report of REPORT/mixing.jsonl again."""
    quick: bool = False
    """A few minutes."""
    strategies: list[str] = field(default_factory=lambda: list(STRATEGIES))
    """Lines of the table; uniform, and what others need, are always among them."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Seeds of the main strategies and of the simple baselines."""
    other_seeds: int = 3
    """How many of the seeds the other strategies get."""
    jobs: int = 2
    """Runs at a time, each on one core."""
    steps: int = 80
    """Steps of tuning."""
    interval: int = 8
    """Steps between decisions."""
    global_batch_size: int = 8
    """Packed rows in a step."""
    lr: float = 1e-3
    """Peak learning rate of tuning."""
    eval_samples: int = 32
    """Held-out rows of each data set."""

    def __post_init__(self) -> None:
        self._one_at_a_time = threading.Lock()

    def run(self) -> None:
        folder = self.report or self.work / "report"
        if not self.report_only:
            self._check()
            os.environ["OMP_NUM_THREADS"] = "1"
            self._train(folder)
        print(f"written: {write_report(folder)}")

    def _check(self) -> None:
        for name in self.strategies:
            if name not in STRATEGIES:
                raise UserError(f"no strategy {name}", f"known: {', '.join(STRATEGIES)}")
        if self.quick:
            self.strategies, self.seeds = ["uniform", "router_load", "load_progress"], [1, 2]
            self.steps, self.interval, self.eval_samples = 36, 3, 8
        needed = {"uniform", *self.strategies}
        needed |= {after for name in needed if (after := STRATEGIES[name].after)}
        self.strategies = [name for name in STRATEGIES if name in needed]

    def _base(self) -> tuple[Base, Path]:
        """What the study starts from, and its conversations."""
        text, talks = folders(self.work, self.pretrain_dir, self.data_dir)
        self.work.mkdir(parents=True, exist_ok=True)
        base = Base(self.work, text)
        if self.quick:
            base = Base(self.work, text, dense_iters=100, moe_iters=30, tokenizer_bytes=200_000)
        return base, base.conversations(talks)

    def _train(self, folder: Path) -> None:
        base, talks = self._base()
        base.dense()
        data = json.loads((talks / "dataset.json").read_text())
        pool = ThreadPoolExecutor(self.jobs)
        # Jobs begin in this order, so what a run waits for is always ahead of it: the model of a
        # seed by the runs of the seed before.
        models: dict[int, Future[Path]] = {}
        runs: dict[tuple[str, int], Future[Row]] = {}
        few = self.seeds[: self.other_seeds]
        groups = ((MAIN, self.seeds), (BASELINES, self.seeds), (OTHERS, few))
        for group, seeds in groups:  # what matters most first: a study may be stopped
            for place, seed in enumerate(seeds):
                for soon in (s for s in seeds[place : place + 2] if s not in models):
                    models[soon] = pool.submit(base.moe, soon)
                for name in (name for name in group if name in self.strategies):
                    needs = STRATEGIES[name].after
                    earlier = runs[needs, seed] if needs else None
                    runs[name, seed] = pool.submit(
                        self._tune, name, seed, models[seed], earlier, talks, base.seq_length
                    )
        try:
            for done in runs.values():
                done.result()
                finished = [r.result() for r in runs.values() if r.done() and not r.exception()]
                write_rows(folder / "mixing.jsonl", [self._settings(base, data), *finished])
        finally:
            pool.shutdown(cancel_futures=True)

    def _tune(
        self,
        name: str,
        seed: int,
        model: Future[Path],
        earlier: Future[Row] | None,
        talks: Path,
        seq_length: int,
    ) -> Row:
        """One run; its row of mixing.jsonl."""
        entry, folder = STRATEGIES[name], self.work / "runs" / name / f"seed{seed}"
        options: Row = dict(entry.options)
        if name == "reference_loss":  # as MoE-SFT: what uniform weights end with
            assert earlier is not None
            options["references"] = earlier.result()["loss"]
        elif name == "sequential":  # turns such that one round fills the run, as in the paper
            count = len(list((talks / "train").glob("*.idx")))
            options["period"] = max(1, round(self.steps / self.interval / count))
        elif name == "final_static":
            assert earlier is not None
            earlier.result()  # it has ended
            ended = self.work / "runs" / "router_load" / f"seed{seed}" / "run"
            options["initial"] = str(ended / "blend_weights.jsonl")
        elif entry.initial:
            data = self._data(talks, seq_length)
            options["initial"] = self._measure(entry.initial, seed, model.result(), data)
        mixing = {"strategy": entry.strategy, "interval": self.interval, "options": options}
        command = ["--load", str(model.result())]
        command += ["--seed", str(seed), *self._data(talks, seq_length)]
        command += ["--freeze", "router", "--moe-gate-noise", "True", "--weight-decay", "0"]
        command += ["--lr", str(self.lr), "--min-lr", "0"]
        command += ["--global-batch-size", str(self.global_batch_size)]
        command += ["--lr-warmup-iters", str(max(1, round(0.03 * self.steps)))]
        rows, cpu = tune(folder, mixing, command, self.steps)
        return {"strategy": name, "seed": seed, **_summary(rows), "cpu": cpu}

    def _measure(self, by: str, seed: int, model: Path, data: list[str]) -> str:
        """Weights in proportion to the distances of a seed's model before tuning."""
        folder = self.work / "weights" / f"seed{seed}"
        output = str(folder / f"{by}.jsonl")
        command = ["--by", by, "--output", output, "--load", str(model), "--task", "sft", *data]
        with self._one_at_a_time:  # two strategies may ask for the same
            step(folder, by, "tools/static_weights.py", command)
        return output

    def _data(self, talks: Path, seq_length: int) -> list[str]:
        """Options of every pass over the conversations."""
        return [
            *("--data-dir", str(talks), "--seq-length", str(seq_length)),
            *("--eval-samples", str(self.eval_samples), "--micro-batch-size", "8"),
            *("--threads", "1"),
        ]

    def _settings(self, base: Base, data: Row) -> Row:
        names = ("seeds", "steps", "interval", "global_batch_size", "lr", "eval_samples", "quick")
        return {
            "study": {name: getattr(self, name) for name in names},
            "base": base.settings,
            "data": {name: _counts(found) for name, found in data["domains"].items()},
        }


def _counts(found: Row) -> Row:
    """Of a domain in dataset.json: sizes and what was left out, without the places of files."""
    kept = {what: found[what] for what in ("train", "valid", "skipped")}
    return kept | {"cut": found.get("cut", 0), "dropped": found.get("dropped", 0)}


def _summary(rows: list[Row]) -> Row:
    """What the report needs of a run's metrics.jsonl."""
    losses = losses_of(rows[-1])
    trained = [row for row in rows if row["kind"] == "train"]
    names = list(losses)
    kinds = ("distance", "progress", "confidence", "excess_loss")
    decisions = []
    for row in (row for row in rows if row["kind"] == "mixing"):
        kept: Row = {"step": row["step"]}
        kept["weights"] = {name: _short(row[f"weight/{name}"]) for name in names}
        for kind in kinds:
            if f"{kind}/{names[0]}" in row:
                kept[kind] = {name: _short(row[f"{kind}/{name}"]) for name in names}
        if "load" in row:
            kept["loads"] = [[_short(share) for share in shares] for shares in row["load"]]
        decisions.append(kept)
    return {
        "loss": {name: round(loss, 5) for name, loss in losses.items()},
        "train_loss": round(sum(row["loss"] for row in trained[-10:]) / len(trained[-10:]), 4),
        "trained_tokens": sum(row["tokens"] for row in trained),
        "epochs": {name: _short(trained[-1][f"epochs/{name}"]) for name in names},
        "decisions": decisions,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def main() -> None:
    study: Study = tyro.cli(Study, description=__doc__)
    study.work = study.work.resolve()
    study.run()


if __name__ == "__main__":
    run_main(main)
