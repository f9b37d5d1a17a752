"""JSON Lines to Megatron's `.bin/.idx`, out of core: tokenize chunks to shards, then merge them.

Workers turn chunks of lines into shards of token ids in OUTPUT.partial, where a journal names the
finished ones; a rerun continues there. Then the shards are merged and the whole directory appears
under its name at once. The bytes are the same for any number of workers and after any interruption.
"""

import concurrent.futures
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_ext.data.journal import Journal, differences
from megatron_ext.data.jsonl import Chunk, JsonlFile, read_chunks, resolve_inputs
from megatron_ext.data.readers import Reader, Task, make_reader, token_dtype
from megatron_ext.data.shards import SPLITS, IndexedWriter, ShardWriter, merge_shards
from megatron_ext.data.templates import TemplateName
from megatron_ext.data.tokenizer import Tokenizer, TokenizerType, load_tokenizer
from megatron_ext.errors import UserError

FORMAT_VERSION = 1

Domains = dict[str, list[JsonlFile]]


@dataclass(frozen=True)
class PreprocessOptions:
    """Tokenize JSON Lines into one Megatron `.bin/.idx` pair per domain and split.

    Of conversations (--task sft), a .mask beside the pair tells which tokens are trained.
    """

    input: tuple[str, ...]
    """NAME=PATH, NAME=GLOB or NAME=DIRECTORY for each domain; without NAME= each file is a domain
    called like its stem. Plain, gzip or zstd."""
    output: Path
    """Directory to create: train/NAME.bin and .idx, valid/NAME.bin and .idx, dataset.json. Work in
    progress is kept in OUTPUT.partial (as large again), and a rerun continues it."""
    tokenizer: Path
    """Sentencepiece .model file, or Hugging Face tokenizer.json or its directory."""
    tokenizer_type: TokenizerType = "auto"
    """Library of the tokenizer; auto: by what the path holds."""
    task: Task = "pretrain"
    """Lines are texts to pretrain on, or conversations for instruction tuning."""
    json_key: str = "text"
    """(pretrain) Key of the text in each line's object."""
    template: TemplateName = "tokenizer"
    """(sft) How a conversation is written: the tokenizer's chat template, or Vicuna's."""
    seq_length: int = 2048
    """(sft) Longer conversations are cut to this many tokens, as training will read them."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Tokenizing processes; they do not change the result."""
    valid_fraction: float = 0.01
    """Share of each domain that is held out, by a hash of the text; at least one text unless 0."""
    valid_documents: int | None = None
    """Hold out this many different texts of each domain instead."""
    append_eod: bool = True
    """(pretrain) End each document with the tokenizer's end-of-sequence id."""
    seed: int = 0
    """Of the choice of held-out texts and of the order of documents."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a malformed line: stop and name it, or leave it out and count it."""

    def __post_init__(self) -> None:
        if not self.input:
            raise UserError("no input", "name one with --input NAME=PATH")
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}", "give at least 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}", "give 0 or more")
        if self.seq_length < 2:
            raise UserError(f"seq_length is {self.seq_length}", "give at least 2")
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}", "give 0 or more, below 1")
        if self.valid_documents is not None and self.valid_documents < 0:
            raise UserError(f"valid_documents is {self.valid_documents}", "give 0 or more")


def preprocess(options: PreprocessOptions) -> dict[str, Any]:
    """Write the data set; returns the content of its `dataset.json`.

    A finished output of the same request is left as it is.

    Raises:
        UserError: an input, the tokenizer or the output cannot be used, or a line is malformed.
    """
    domains = resolve_inputs(options.input)
    tokenizer = load_tokenizer(options.tokenizer, options.tokenizer_type)
    reader, settings = make_reader(
        tokenizer,
        options.task,
        options.json_key,
        options.append_eod,
        options.template,
        options.seq_length,
    )
    request = _request(options, tokenizer, settings, domains)
    output = options.output.resolve()
    partial = output.with_name(output.name + ".partial")
    finished = _finished_output(output, request)
    if finished is not None:
        print(f"{options.output} is already complete")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed in its last moment
        return finished
    try:
        with Journal(partial, request) as journal:
            shards = _tokenize(options, reader, domains, journal)
            dataset = _merge(options, tokenizer, reader, journal, shards)
            dataset["request"] = request
            temporary = partial / "dataset" / "dataset.json"
            temporary.write_text(json.dumps(dataset, indent=2) + "\n")
            os.replace(partial / "dataset", output)
            shutil.rmtree(partial)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"no space left for {partial}", "make room and rerun: finished shards are kept"
        ) from error
    _report(options.output, dataset)
    return dataset


# --- What the result depends on ---------------------------------------------------------------


def _request(
    options: PreprocessOptions, tokenizer: Tokenizer, settings: dict[str, Any], domains: Domains
) -> dict[str, Any]:
    """Everything that decides the bytes of the output."""
    by_count = options.valid_documents is not None
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        **settings,
        "seed": options.seed,
        "valid_fraction": None if by_count else options.valid_fraction,
        "valid_documents": options.valid_documents,
        "on_error": options.on_error,
        "inputs": {
            domain: [[str(file.path.resolve()), file.size, file.mtime_ns] for file in files]
            for domain, files in domains.items()
        },
    }


def _finished_output(output: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The output's dataset.json if it answers this request; None if there is no output yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        dataset = json.loads((output / "dataset.json").read_text())
        different = differences(dataset["request"], request)
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"output {output} exists and is no data set of this tool", "name another --output"
        ) from None
    if different:
        raise UserError(
            f"output {output} exists and was made with another {different}",
            "name another --output, or delete this one",
        )
    return dataset


# --- First pass: chunks to shards -------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One chunk for a worker, and of which domain and file it is."""

    shard: str
    domain: str
    file_number: int
    source: list[Any]
    """Path, size and time of the file, and the chunk size: a shard is of use while these hold."""
    chunk: Chunk


def _jobs(domains: Domains, total: int) -> Iterator[_Job]:
    # About a thousand shards, so that small inputs keep all workers busy and large ones do not
    # drown in files. The result does not depend on it.
    chunk_bytes = min(max(1 << 20, 1 << (total // 1024).bit_length()), 1 << 25)
    for domain, files in domains.items():
        for number, file in enumerate(files):
            source = [str(file.path.resolve()), file.size, file.mtime_ns, chunk_bytes]
            for chunk in read_chunks(file, chunk_bytes):
                shard = f"{domain}-{number:05d}-{chunk.number:06d}"
                yield _Job(shard, domain, number, source, chunk)


_writer: ShardWriter  # of a worker process


def _start_worker(writer: ShardWriter, parent: int) -> None:
    """Runs in each worker after the fork; nothing of the tokenizer is pickled."""
    global _writer
    _writer = writer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a killed parent cannot stop its workers

    threading.Thread(target=follow_parent, daemon=True).start()


def _run(job: _Job) -> dict[str, Any]:
    written = _writer.write(job.shard, job.file_number, job.chunk)
    return {"shard": job.shard, "domain": job.domain, "source": job.source, **written}


def _tokenize(
    options: PreprocessOptions, reader: Reader, domains: Domains, journal: Journal
) -> dict[str, list[str]]:
    """Bring every shard into the journal; returns the names of each domain's shards, in order.

    Raises:
        UserError: the first malformed line of the input, unless they are to be skipped.
    """
    total = sum(file.size for files in domains.values() for file in files)
    shards: dict[str, list[str]] = {domain: [] for domain in domains}
    running: dict[concurrent.futures.Future[dict[str, Any]], _Job] = {}
    malformed: list[tuple[_Job, dict[str, Any]]] = []

    def collect(when: str) -> None:
        for future in concurrent.futures.wait(running, return_when=when).done:
            job, record = running.pop(future), future.result()
            bar.update(job.chunk.disk_bytes)
            if "bin_bytes" in record:
                journal.add(record)
            else:
                malformed.append((job, record))

    writer = ShardWriter(
        directory=journal.shards,
        reader=reader,
        seed=options.seed,
        skip_errors=options.on_error == "skip",
    )
    with (
        concurrent.futures.ProcessPoolExecutor(
            max_workers=options.workers,
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_worker,
            initargs=(writer, os.getpid()),
        ) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5) as bar,
    ):
        try:
            for job in _jobs(domains, total):
                shards[job.domain].append(job.shard)
                if journal.has(job.shard, job.source, options.on_error == "skip"):
                    bar.update(job.chunk.disk_bytes)
                    continue
                # A queue of two keeps workers busy; more would only hold memory.
                if len(running) >= options.workers + 2:
                    collect(concurrent.futures.FIRST_COMPLETED)
                if malformed:
                    break
                running[pool.submit(_run, job)] = job
            collect(concurrent.futures.ALL_COMPLETED)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory?)",
                "rerun with fewer --workers: finished shards are kept",
            ) from None
    if malformed:
        # All before the first were submitted before it, so this one does not depend on timing.
        position = {name: n for n, name in enumerate(n for names in shards.values() for n in names)}
        job, record = min(malformed, key=lambda pair: position[pair[0].shard])
        line, complaint = record["examples"][0]
        raise UserError(
            f"{job.source[0]}, line {line}: {complaint}",
            "mend it and rerun (finished shards are kept), or pass --on-error skip",
        )
    return shards


# --- Second pass: shards to domains -----------------------------------------------------------


def _merge(
    options: PreprocessOptions,
    tokenizer: Tokenizer,
    reader: Reader,
    journal: Journal,
    shards: dict[str, list[str]],
) -> dict[str, Any]:
    """Write every domain of the partial data set; returns the content of dataset.json."""
    directory = journal.partial / "dataset"
    shutil.rmtree(directory, ignore_errors=True)
    dtype = token_dtype(tokenizer.vocab_size)
    by_count = options.valid_documents is not None
    hold_out = options.valid_documents if by_count else float(options.valid_fraction)
    assert hold_out is not None
    total = sum(journal.records[name]["bin_bytes"] for names in shards.values() for name in names)
    domains: dict[str, Any] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", mininterval=0.5) as bar:
        for domain, names in shards.items():
            outputs = {
                split: IndexedWriter(directory / split / domain, dtype, options.task == "sft")
                for split in SPLITS
            }
            paths = [journal.shards / name for name in names]
            merge_shards(paths, outputs, reader.dtype, hold_out, bar.update)
            records = [journal.records[name] for name in names]
            domains[domain] = _close(domain, outputs, records)
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "path": str(tokenizer.path.resolve()),
            "type": tokenizer.library,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "task": options.task,
        **({"template": options.template} if options.task == "sft" else {}),
        "dtype": dtype.name,
        "seed": options.seed,
        "domains": domains,
    }


def _close(
    domain: str, outputs: dict[str, IndexedWriter], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Finish a domain's files; returns its part of dataset.json."""
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record["skipped"])
    examples = [
        [record["source"][0], line, complaint]
        for record in records
        for line, complaint in record["examples"]
    ]
    if not outputs["train"].documents:
        held_out = outputs["valid"].documents
        raise UserError(
            f"domain {domain!r} has no document left to train on "
            f"({held_out} held out, {sum(skipped.values())} lines skipped)",
            "hold out fewer, or look at its input",
        )
    summary: dict[str, Any] = {}
    for split, output in outputs.items():
        output.close()
        summary[split] = {
            "documents": output.documents,
            "tokens": output.tokens,
            "text_bytes": output.text_bytes,
        }
        if output.trained:
            summary[split]["trained_tokens"] = output.trained
    for what in ("cut", "dropped"):
        if count := sum(record[what] for record in records):
            summary[what] = count
    return {**summary, "skipped": dict(sorted(skipped.items())), "skipped_examples": examples[:20]}


def _report(output: Path, dataset: dict[str, Any]) -> None:
    """Print what was written and what was skipped."""
    print(f"{'domain':20} {'train documents':>16} {'tokens':>16} {'valid documents':>16} tokens")
    for name, domain in dataset["domains"].items():
        cells = [domain[split][what] for split in SPLITS for what in ("documents", "tokens")]
        print(f"{name:20} " + " ".join(f"{cell:>16,}" for cell in cells))
        if trained := domain["train"].get("trained_tokens"):
            print(f"  {trained / domain['train']['tokens']:.0%} of the tokens are trained")
        if cut := domain.get("cut"):
            print(f"  cut {cut:,} conversations to seq_length")
        if dropped := domain.get("dropped"):
            print(f"  left out {dropped:,} conversations: nothing to train on within seq_length")
        for reason, count in domain["skipped"].items():
            print(f"  skipped {count:,} lines: {reason}")
        for path, line, complaint in domain["skipped_examples"][:3]:
            print(f"    {path}, line {line}: {complaint}")
    print(f"wrote {output}")
