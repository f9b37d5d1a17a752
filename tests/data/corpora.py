"""JSON Lines to preprocess, and the data sets that come of them."""

import dataclasses
import gzip
import json
import sys
from pathlib import Path

import zstandard

from megatron_ext.data.preprocess import PreprocessOptions

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
EOS = "<|endoftext|>"


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({key: t, "n": i}) + "\n" for i, t in enumerate(texts)).encode()
    if path.suffix == ".gz":  # two members, as concatenated downloads have
        half = len(data) // 2
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])
    elif path.suffix == ".zst":
        half = len(data) // 2
        data = b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))
    path.write_bytes(data)
    return path


def read(prefix: Path) -> list[list[int]]:
    """Documents as megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def options(tmp_path: Path, tokenizer: Path, *inputs: str, **others: object) -> PreprocessOptions:
    base = PreprocessOptions(input=inputs, output=tmp_path / "out", tokenizer=tokenizer, workers=2)
    return dataclasses.replace(base, **others)  # type: ignore[arg-type]
