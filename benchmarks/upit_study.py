"""Does UpIT help, and which part of it? Dense tuning, plain upcycling and UpIT's parts compared.

    python benchmarks/upit_study.py --data-dir TALKS --pretrain-dir TEXT

TALKS and TEXT hold a .jsonl file for each data set (conversations; {"text"}); without them the
demo's are taken, which pip brings. A dense LLaMA is trained on TEXT once. For every seed it is
tuned on TALKS; checkpoints of that run become experts, and the mixture is tuned with what is left
of the budget: every variant reads the same number of tokens. Variants of a seed share the dense
run and the order of samples, so they are compared in pairs. Interrupted? Start it again: what is
finished is not done twice, and --report-only writes the report of what there is.

--quick takes a few minutes: two variants, two seeds, short runs of a barely trained model. It shows
that everything works, and nothing else.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from stages import losses_of, step
from study_base import Base, folders, tune, write_rows
from upit_report import write_report

from megatron_ext.errors import UserError, run_main

Row = dict[str, Any]

ROUTER_REPORT = "router_init.json"
EXPERTS = 8
SIZE = ("--num-experts", str(EXPERTS), "--moe-router-topk", "2")


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    from_run: bool = False
    """Experts are checkpoints of the dense run (UpIT)."""
    copies: bool = False
    """Experts are copies of the base (sparse upcycling)."""
    real: int = EXPERTS // 2
    """Checkpoints that become experts; the rest are merged ones."""
    parents: str = "dissimilar"
    """Of merged experts."""
    buckets: str | None = "perplexity"
    """How seed data is dealt to the experts; none: routers are not trained first."""
    half: bool = False
    """With half of the tokens."""


VARIANTS = {
    "dense": Entry(),
    "upcycling": Entry(copies=True),
    "upit": Entry(from_run=True),
    "no_router_init": Entry(from_run=True, buckets=None),
    "random_seed_data": Entry(from_run=True, buckets="random"),
    "no_expansion": Entry(from_run=True, real=EXPERTS),
    "random_parents": Entry(from_run=True, parents="random"),
    "dense_half": Entry(half=True),
    "upcycling_half": Entry(copies=True, half=True),
    "upit_half": Entry(from_run=True, half=True),
}


@dataclass
class Study:
    """Tune one small LLaMA as a dense model, as copies of itself, and by UpIT."""

    data_dir: Path | None = None
    """Conversations: a .jsonl file for each data set; none: the demo's."""
    pretrain_dir: Path | None = None
    """Text the model is made of: a .jsonl file for each domain; none: the demo's."""
    work: Path = Path("results/upit_study")
    """Folder of the study; a study found there goes on."""
    report: Path | None = None
    """Folder of upit.md, upit.jsonl and pictures; none: WORK/report."""
    report_only: bool = False
    """Train nothing: write the report of REPORT/upit.jsonl again."""
    quick: bool = False
    """A few minutes."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Lines of the table."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of everything that is drawn."""
    jobs: int = 2
    """Seeds at a time, each on one core."""
    steps: int = 96
    """Steps of every variant in all; UpIT spends half of them on the dense run."""
    global_batch_size: int = 8
    """Packed rows in a step."""
    lr: float = 1e-3
    """Peak learning rate of each run."""
    seed_fraction: float = 0.02
    """Part of the conversations that routers are trained on first."""
    eval_samples: int = 32
    """Held-out rows of each data set."""

    def run(self) -> None:
        folder = self.report or self.work / "report"
        if not self.report_only:
            self._check()
            os.environ["OMP_NUM_THREADS"] = "1"
            self._study(folder)
        print(f"written: {write_report(folder)}")

    def _check(self) -> None:
        for name in self.variants:
            if name not in VARIANTS:
                raise UserError(f"no variant {name}", f"known: {', '.join(VARIANTS)}")
        if self.quick:
            self.variants, self.seeds = ["upcycling", "upit"], [1, 2]
            self.steps, self.eval_samples = 32, 8
        if self.steps % (4 * EXPERTS):
            raise UserError(
                f"steps={self.steps} must be a multiple of {4 * EXPERTS}",
                "half of the half is split into one interval for each expert",
            )

    def _study(self, folder: Path) -> None:
        text, talks = folders(self.work, self.pretrain_dir, self.data_dir)
        self.work.mkdir(parents=True, exist_ok=True)
        base = Base(self.work, text)
        if self.quick:
            base = Base(self.work, text, dense_iters=100, tokenizer_bytes=200_000)
        self._talks, self._dense = base.conversations(talks), base.dense()
        self._seq_length = base.seq_length
        data = json.loads((self._talks / "dataset.json").read_text())["domains"]
        names = ("steps", "global_batch_size", "lr", "seed_fraction", "eval_samples", "quick")
        settings = {
            "study": {name: getattr(self, name) for name in (*names, "seeds")},
            "base": base.settings,
            "data": {
                name: {k: found[k] for k in ("train", "valid")} for name, found in data.items()
            },
        }
        rows: list[Row] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            # First what several variants of a seed need, then variant by variant.
            lengths = {VARIANTS[name].half for name in self.variants if VARIANTS[name].from_run}
            runs = [(seed, half) for seed in self.seeds for half in sorted(lengths)]
            list(pool.map(self._prepare, *zip(*runs, strict=True)) if runs else ())
            jobs = [(name, seed) for name in self.variants for seed in self.seeds]
            for (name, seed), found in zip(
                jobs, pool.map(self._variant, *zip(*jobs, strict=True)), strict=True
            ):
                rows.append({"variant": name, "seed": seed, **found})
                write_rows(folder / "upit.jsonl", [settings, *rows])

    def _variant(self, name: str, seed: int) -> Row:
        """One line of upit.jsonl, without its first two columns."""
        entry, folder = VARIANTS[name], self.work / f"seed{seed}" / name
        steps = self.steps // 2 if entry.half else self.steps
        model, found = self._dense, {}
        if entry.from_run:
            model, steps = self._upit(folder, entry, seed), steps // 2
            if entry.buckets:
                found["router"] = json.loads((folder / ROUTER_REPORT).read_text())
        elif entry.copies:
            model = folder / "experts"
            place = ("--source", str(self._dense), "--output", str(model), "--skip-verify")
            command = ("upcycle", "--method", "copies", *place, *SIZE, "--seed", str(seed))
            step(folder, "experts", "tools/convert_llama.py", (*command, "--force"))
        rows, cpu = self._tune(folder, model, seed, steps)
        for made in ("experts", "routed"):  # what was measured stays
            shutil.rmtree(folder / made, ignore_errors=True)
        losses = losses_of(rows[-1])
        loads = [row["load"] for row in rows if "load" in row]
        if loads:
            found["loads"] = dict(zip(sorted(losses), loads[-1], strict=True))
        return {"loss": losses, "cpu": cpu, **found}

    def _upit(self, folder: Path, entry: Entry, seed: int) -> Path:
        """Experts out of the dense run, with routers."""
        run = self._prepare(seed, entry.half)
        every = self._dense_steps(entry.half) // entry.real
        kept = ",".join(str(number * every) for number in range(1, entry.real + 1))
        place = ("--base", str(self._dense), "--source", str(run), "--iterations", kept)
        target = ("--output", str(folder / "experts"), "--seed", str(seed), "--skip-verify")
        command = ("upit", *place, *SIZE, *target, "--parents", entry.parents, "--force")
        step(folder, "experts", "tools/convert_llama.py", command)
        if entry.buckets is None:
            return folder / "experts"
        options = ["--load", str(folder / "experts"), "--save", str(folder / "routed"), "--force"]
        options += ["--data-dir", str(self._talks), "--seq-length", str(self._seq_length)]
        options += ["--buckets", entry.buckets, "--seed-fraction", str(self.seed_fraction)]
        options += ["--seed", str(seed), "--micro-batch-size", "8"]
        step(folder, "route", "tools/initialise_router.py", options)
        if not (folder / ROUTER_REPORT).is_file():
            shutil.copy(folder / "routed" / ROUTER_REPORT, folder)
        return folder / "routed"

    def _dense_steps(self, half: bool) -> int:
        return self.steps // (4 if half else 2)

    def _prepare(self, seed: int, half: bool) -> Path:
        """The dense run whose checkpoints become experts: one for each, at most."""
        steps = self._dense_steps(half)
        folder = self.work / f"seed{seed}" / f"sft{steps}"
        keep = ("--save-interval", str(steps // EXPERTS), "--keep-latest", "0")
        self._tune(folder, self._dense, seed, steps, keep)
        return folder / "run"

    def _tune(
        self,
        folder: Path,
        model: Path,
        seed: int,
        steps: int,
        keep: tuple[str, ...] = (),
    ) -> tuple[list[Row], float]:
        """One run of finetune_moe.py: rows of its metrics.jsonl, CPU seconds.

        Data sets count alike: with eta = 0 the rule of router loads leaves the weights as they are,
        and notes the loads.
        """
        mixing: Row = {"strategy": "uniform"}
        if model != self._dense:
            mixing = {"strategy": "router_load", "options": {"eta": 0.0}, "interval": steps}
        options = ["--load", str(model), "--finetune", "True"]
        options += ["--data-dir", str(self._talks), "--seed", str(seed)]
        options += ["--seq-length", str(self._seq_length), "--threads", "1", *keep]
        options += ["--micro-batch-size", "8", "--lr", str(self.lr)]
        options += ["--global-batch-size", str(self.global_batch_size), "--min-lr", "0"]
        options += ["--weight-decay", "0", "--lr-warmup-iters", str(max(1, steps // 32))]
        options += ["--eval-samples", str(self.eval_samples)]
        return tune(folder, mixing, options, steps, bool(keep))


def main() -> None:
    study: Study = tyro.cli(Study, description=__doc__)
    study.work = study.work.resolve()
    study.run()


if __name__ == "__main__":
    run_main(main)
