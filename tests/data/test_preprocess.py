"""JSON Lines to .bin/.idx: real tokenizers on real text, and everything that can go wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.corpora import EOS, TOOL, contents, options, read, write_jsonl

from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.readers import token_dtype
from megatron_ext.data.tokenizer import load_megatron_tokenizer, load_tokenizer
from megatron_ext.errors import UserError


def test_same_ids_as_megatron_core(tokenizer_path: Path, texts: list[str]) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    ours = load_tokenizer(tokenizer_path)
    theirs = load_megatron_tokenizer(ours)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod_id == theirs.eod
    sample = texts[::40] + texts[-2:] + ["", " ", f"a {EOS} b", "</s>", "a" * 300]
    assert ours.encode_batch(sample) == [theirs.tokenize(text) for text in sample]
    for size in (1000, 65499, 65500, 200_000):
        assert token_dtype(size) == DType.optimal_dtype(size)


def test_round_trip(tmp_path: Path, tokenizer_path: Path, texts: list[str]) -> None:
    code = write_jsonl(tmp_path / "code.jsonl", texts)
    made = preprocess(options(tmp_path, tokenizer_path, str(code), valid_fraction=0.05))

    tokenizer = load_tokenizer(tokenizer_path)
    detokenize = load_megatron_tokenizer(tokenizer).detokenize
    splits = {}
    for split in ("train", "valid"):
        documents = read(tmp_path / "out" / split / "code")
        assert all(document[-1] == tokenizer.eod_id for document in documents)
        decoded = [detokenize(document[:-1]) for document in documents]
        splits[split] = decoded
        assert made["domains"]["code"][split] == {
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "text_bytes": sum(len(text.encode()) for text in decoded),
        }
    assert Counter(splits["train"] + splits["valid"]) == Counter(texts)
    assert 0.02 < len(splits["valid"]) / len(texts) < 0.08
    assert made["tokenizer"]["eod_id"] == tokenizer.eod_id and made["dtype"] == "uint16"
    # Shuffled: neighbours in the file are no neighbours in the output.
    place = {text: i for i, text in enumerate(texts)}
    steps = np.diff([place[text] for text in splits["train"]])
    assert np.mean(np.abs(steps) < 10) < 0.1
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == made
    assert not (tmp_path / "out.partial").exists()


def test_idx_is_what_megatron_builds(
    tmp_path: Path, sentencepiece_model: Path, texts: list[str]
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    source = write_jsonl(tmp_path / "a.jsonl", texts[:200])
    preprocess(options(tmp_path, sentencepiece_model, str(source)))
    prefix = tmp_path / "out" / "train" / "a"
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in read(prefix):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert prefix.with_suffix(suffix).read_bytes() == (
            (tmp_path / "theirs").with_suffix(suffix).read_bytes()
        )


def test_same_bytes_for_any_workers_compression_and_chunks(
    tmp_path: Path,
    sentencepiece_model: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    reference = options(tmp_path, sentencepiece_model, f"a={source}", workers=1)
    preprocess(reference)
    expected = contents(tmp_path / "out")
    again = dataclasses.replace(reference, output=tmp_path / "again", workers=3)
    preprocess(again)
    assert contents(tmp_path / "again") == expected

    # Chunks of a few lines, and a merge of many ranges.
    import megatron_ext.data.preprocess as module
    import megatron_ext.data.shards as shards

    whole = module.read_chunks
    monkeypatch.setattr(module, "read_chunks", lambda file, _: whole(file, 50_000))
    monkeypatch.setattr(shards, "_MERGE_BYTES", 40_000)
    bare = {name: data for name, data in expected.items() if name != "dataset.json"}
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        packed = write_jsonl(tmp_path / f"b{suffix}", texts)
        output = tmp_path / f"out{suffix}"
        preprocess(dataclasses.replace(reference, input=(f"a={packed}",), output=output))
        found = contents(output)
        del found["dataset.json"]
        assert found == bare

    preprocess(dataclasses.replace(reference, output=tmp_path / "other", seed=1))
    other = contents(tmp_path / "other")
    assert other["train/a.bin"] != expected["train/a.bin"]


def test_held_out_texts_are_in_no_training_domain(
    tmp_path: Path, sentencepiece_model: Path, texts: list[str]
) -> None:
    """The same texts, several times and in two domains, fall on one side."""
    write_jsonl(tmp_path / "a.jsonl", texts[:400] + texts[:200])
    write_jsonl(tmp_path / "b.jsonl", texts[100:500])
    preprocess(options(tmp_path, sentencepiece_model, str(tmp_path), valid_fraction=0.2))
    found: dict[str, list[tuple[int, ...]]] = {"train": [], "valid": []}
    for split in found:
        for domain in "ab":
            found[split] += map(tuple, read(tmp_path / "out" / split / domain))
    assert not set(found["train"]) & set(found["valid"])
    written = 2 * len(texts[:200]) + len(texts[200:400]) + len(texts[100:500])
    assert len(found["train"]) + len(found["valid"]) == written
    assert len(found["valid"]) > 50


@pytest.mark.parametrize(
    ("chosen", "held_out"),
    [({"valid_documents": 7}, 7), ({"valid_fraction": 1e-9}, 1), ({"valid_fraction": 0.0}, 0)],
)
def test_how_much_is_held_out(
    tmp_path: Path,
    sentencepiece_model: Path,
    texts: list[str],
    chosen: dict[str, float],
    held_out: int,
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    made = preprocess(options(tmp_path, sentencepiece_model, str(source), **chosen))
    assert made["domains"]["a"]["valid"]["documents"] == held_out
    assert made["domains"]["a"]["train"]["documents"] == 50 - held_out
    assert (tmp_path / "out" / "valid" / "a.bin").exists() == bool(held_out)


def test_without_eod_and_with_another_key(
    tmp_path: Path, sentencepiece_model: Path, texts: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:20], key="content")
    chosen = options(
        tmp_path, sentencepiece_model, str(source), append_eod=False, json_key="content"
    )
    preprocess(chosen)
    encoded = load_tokenizer(sentencepiece_model).encode_batch(texts[:20])
    found = read(tmp_path / "out/train/a") + read(tmp_path / "out/valid/a")
    assert sorted(found) == sorted(encoded)


BAD_LINES = [
    (b'{"text": "cut', "bad JSON"),
    (b'{"other": "x"}', "missing key"),
    (b'{"text": 7}', "not a string"),
    (b'{"text": " \\n"}', "empty text"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "invalid UTF-8"),
    (b"[1]", "not an object"),
    (b"", "empty line"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_malformed_line_is_named(
    tmp_path: Path, sentencepiece_model: Path, line: bytes, reason: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "good"}\n' * 41 + line + b'\n{"text": "good"}\n')
    with pytest.raises(UserError, match=f"a.jsonl, line 42: {reason}"):
        preprocess(options(tmp_path, sentencepiece_model, str(source)))
    assert not (tmp_path / "out").exists()


def test_skipped_lines_are_counted(
    tmp_path: Path,
    sentencepiece_model: Path,
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After a run that stopped, the same command with --on-error skip goes on."""
    good = [json.dumps({"text": text}).encode() for text in texts]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(good + [line for line, _ in BAD_LINES if line]))
    chosen = options(tmp_path, sentencepiece_model, str(source))
    with pytest.raises(UserError, match=f"line {len(good) + 1}: bad JSON"):
        preprocess(chosen)
    made = preprocess(dataclasses.replace(chosen, on_error="skip"))
    domain = made["domains"]["a"]
    assert domain["skipped"] == Counter(reason for line, reason in BAD_LINES if line)
    assert domain["train"]["documents"] + domain["valid"]["documents"] == len(good)
    assert f"line {len(good) + 1}: bad JSON" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damaged_compression_is_refused(
    tmp_path: Path, sentencepiece_model: Path, texts: list[str], suffix: str
) -> None:
    source = write_jsonl(tmp_path / f"a{suffix}", texts)
    data = source.read_bytes()
    source.write_bytes(data[:-1000])
    with pytest.raises(UserError, match="ends in the middle"):
        preprocess(options(tmp_path, sentencepiece_model, str(source)))
    source.write_bytes(data[:5000] + b"\0" * 100 + data[5100:])
    with pytest.raises(UserError, match="is damaged near|bad JSON|invalid UTF-8"):
        preprocess(options(tmp_path, sentencepiece_model, str(source)))


def test_refused_before_work(
    tmp_path: Path, sentencepiece_model: Path, huggingface_directory: Path, texts: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:10])
    (tmp_path / "sub").mkdir()
    same_name = write_jsonl(tmp_path / "sub" / "a.jsonl", texts[:10])
    packed = tmp_path / "a.jsonl.bz2"
    packed.write_bytes(b"BZh9")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for inputs, message in [
        ((str(tmp_path / "none.jsonl"),), "does not exist"),
        ((f"x={tmp_path}/*.txt",), "matches no file"),
        ((str(source), str(same_name)), "two inputs are called 'a'"),
        ((f"a={source}", f"a={same_name}"), "two inputs are called 'a'"),
        ((str(packed),), "bzip2 is no compression"),
        ((f"a/b={source}",), "cannot name a domain"),
        ((str(empty),), "has no text"),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess(options(tmp_path, sentencepiece_model, *inputs))
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    tokenizer_json = (huggingface_directory / "tokenizer.json").read_bytes()
    (nameless / "tokenizer.json").write_bytes(tokenizer_json)
    for tokenizer, message in [
        (tmp_path / "none.model", "does not exist"),
        (source.with_suffix(".jsonl"), "cannot be read as a sentencepiece model"),
        (tmp_path / "sub", "holds no tokenizer"),
        (nameless, "names no end-of-sequence token"),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess(options(tmp_path, tokenizer, str(source)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match="is no data set of this tool"):
        preprocess(options(tmp_path, sentencepiece_model, str(source)))
    assert not (tmp_path / "out.partial").exists()


def test_finished_output_is_kept(
    tmp_path: Path, sentencepiece_model: Path, texts: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:30])
    chosen = options(tmp_path, sentencepiece_model, str(source))
    (tmp_path / "out").mkdir()  # an empty directory is no output yet
    made = preprocess(chosen)
    before = (tmp_path / "out/train/a.bin").stat().st_mtime_ns
    assert preprocess(chosen) == made
    assert (tmp_path / "out/train/a.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made with another seed"):
        preprocess(dataclasses.replace(chosen, seed=3))
    write_jsonl(source, texts[:31])
    with pytest.raises(UserError, match="made with another inputs"):
        preprocess(chosen)


def test_killed_run_is_continued(
    tmp_path: Path, sentencepiece_model: Path, texts: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl.gz", texts * 4)
    reference = options(tmp_path, sentencepiece_model, f"a={source}")
    preprocess(reference)

    output = tmp_path / "killed"
    command = [*TOOL, "--input", f"a={source}", "--output", str(output), "--workers", "1"]
    command += ["--tokenizer", str(sentencepiece_model)]
    journal = tmp_path / "killed.partial" / "journal.jsonl"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not output.exists()
    with open(journal, "ab") as file:
        file.write(b'{"shard": "a-000')  # a line that was being written
    shards = tmp_path / "killed.partial" / "shards"
    before = {p.name: p.stat().st_mtime_ns for p in shards.glob("a-*-00000[01].*")}
    assert len(before) == 4
    finished = journal.read_bytes().count(b"\n")

    with pytest.raises(UserError, match="unfinished work with another seed"):
        preprocess(dataclasses.replace(reference, output=output, seed=1))

    # What is left takes only the shards that are missing: the others keep their time.
    import megatron_ext.data.preprocess as module

    kept: dict[str, int] = {}
    merge = module._merge

    def watch(*arguments: object) -> dict[str, object]:
        kept.update({name: (shards / name).stat().st_mtime_ns for name in before})
        return merge(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_merge", watch)
        preprocess(dataclasses.replace(reference, output=output))
    assert finished >= 3 and kept == before
    assert contents(output) == contents(tmp_path / "out")


def test_command_line(tmp_path: Path, huggingface_directory: Path, texts: list[str]) -> None:
    (tmp_path / "wiki").mkdir()
    write_jsonl(tmp_path / "wiki" / "1.jsonl.gz", texts[:30])
    write_jsonl(tmp_path / "wiki" / "2.jsonl", texts[30:50])
    code = write_jsonl(tmp_path / "code.jsonl.zst", texts[50:90])
    command = [*TOOL, "--input", f"wiki={tmp_path / 'wiki'}", str(code)]
    command += ["--tokenizer", str(huggingface_directory / "tokenizer.json")]
    command += ["--output", str(tmp_path / "out"), "--valid-documents", "2", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokenizing" in done.stderr and "100%" in done.stderr
    made = json.loads((tmp_path / "out" / "dataset.json").read_text())
    documents = {name: domain["train"]["documents"] for name, domain in made["domains"].items()}
    assert documents == {"wiki": 48, "code": 38}

    command[command.index(str(code))] = str(tmp_path / "missing.jsonl")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error:" in done.stderr and "missing.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
