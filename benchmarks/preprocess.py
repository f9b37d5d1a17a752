"""CPU-seconds of tools/preprocess_data.py against its tokenizer library alone, side by side.

    python benchmarks/preprocess.py            # about 3 minutes
    python benchmarks/preprocess.py --megabytes 8 --runs 1

The text is Python's standard library. The peer is a process that encodes the same texts, parsed and
in memory, in batches on one thread, and does nothing else. The tool reads, parses, tokenizes,
shuffles and writes, with one worker, so that both have a core to themselves. CPU time counts all
processes of a run; medians of the runs. Start-up is what the tool costs for four documents.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from report import Row, row, write

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 16_000
BAR = 0.85
PEER_START_UP = 14.0  # CPU-seconds of Megatron-LM's own tool

# What the peer runs: argv is the library, the tokenizer and the texts (null: only start).
BARE = """
import json, resource, sys, time
library, path, texts = sys.argv[1:]
if library == "sentencepiece":
    import sentencepiece
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    encode = lambda batch: processor.encode(batch, num_threads=1)
else:
    import tokenizers
    backend = tokenizers.Tokenizer.from_file(path + "/tokenizer.json")
    encode = lambda batch: [
        e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)
    ]
texts = json.load(open(texts))
before = time.process_time()
for start in range(0, len(texts), 64):
    encode(texts[start : start + 64])
print(time.process_time() - before)
"""


def documents(megabytes: float) -> Iterator[str]:
    """Sources of the standard library, cut into documents of about 4 kB."""
    left = int(megabytes * 1e6)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for start in range(0, len(text), 4000):
            document = text[start : start + 4000]
            if document.strip():
                left -= len(document.encode())
                yield document
            if left < 0:
                return


def train_sentencepiece(texts: list[str], directory: Path) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_prefix=str(directory / "sp"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        minloglevel=2,
    )
    return directory / "sp.model"


def train_huggingface(texts: list[str], directory: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path = directory / "hf"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def cpu_seconds(command: list[str]) -> tuple[float, str]:
    """CPU time of a command and all its children, and its standard output."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return used() - before, done.stdout


def measure(library: str, tokenizer: Path, texts: list[str], runs: int, work: Path) -> list[Row]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, chosen in (("all", texts), ("few", texts[:4])):
        (work / f"{name}.json").write_text(json.dumps(chosen))
        lines = (json.dumps({"text": text}) + "\n" for text in chosen)
        (work / f"{name}.jsonl").write_text("".join(lines))

    def bare() -> float:
        arguments = [library, str(tokenizer), str(work / "all.json")]
        return float(cpu_seconds([sys.executable, "-c", BARE, *arguments])[1])

    def tool(name: str) -> float:
        with tempfile.TemporaryDirectory(dir=work) as output:
            arguments = ["--input", str(work / f"{name}.jsonl"), "--output", f"{output}/tokens"]
            arguments += ["--tokenizer", str(tokenizer), "--workers", "1"]
            script = str(ROOT / "tools" / "preprocess_data.py")
            return cpu_seconds([sys.executable, script, *arguments])[0]

    alone, whole, start_up = [], [], []
    for run in range(runs):
        print(f"{library}: run {run + 1} of {runs}", flush=True)
        alone.append(bare())
        whole.append(tool("all"))
        start_up.append(tool("few"))
    library_seconds = statistics.median(alone)
    tool_seconds, start_seconds = statistics.median(whole), statistics.median(start_up)
    wrapper = (
        "from pathlib import Path; from megatron_ext.data import tokenizer as t; "
        f"t.load_megatron_tokenizer(t.load_tokenizer(Path({str(tokenizer)!r})))"
    )
    wrapper_seconds = cpu_seconds([sys.executable, "-c", wrapper])[0]
    rate = "MB per CPU-second"
    peer = megabytes / library_seconds
    return [
        row(
            f"{library}: after start-up, against the library alone",
            rate,
            megabytes / (tool_seconds - start_seconds),
            peer,
            bar=BAR * peer,
        ),
        row(
            f"{library}: whole run over {megabytes:.0f} MB, against the library alone",
            rate,
            megabytes / tool_seconds,
            peer,
        ),
        row(
            f"{library}: start-up, against loading it through megatron-core",
            "CPU-seconds",
            start_seconds,
            wrapper_seconds,
            bar=wrapper_seconds,
            higher_is_better=False,
        ),
        row(
            f"{library}: start-up, against Megatron-LM's tool (its figure, not measured here)",
            "CPU-seconds",
            start_seconds,
            PEER_START_UP,
            bar=PEER_START_UP,
            higher_is_better=False,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=24.0, help="text to tokenize")
    parser.add_argument("--runs", type=int, default=3, help="of each measurement")
    options = parser.parse_args()
    texts = list(documents(options.megabytes))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        for library, train in (
            ("sentencepiece", train_sentencepiece),
            ("huggingface", train_huggingface),
        ):
            tokenizer = train(texts[:2000], directory)
            rows += measure(library, tokenizer, texts, options.runs, directory)
    print(f"written to {write('preprocess', rows)}")


if __name__ == "__main__":
    main()
