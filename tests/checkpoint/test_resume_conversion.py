"""A conversion that is killed goes on where it stopped and ends with the same bytes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.journal import JOURNAL_FILE
from megatron_ext.errors import UserError
from tests.checkpoint.tiny import convert, save_llama

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--num-experts", "8", "--skip-verify"]


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def kill_on_its_way(source: Path, output: Path) -> Path:
    """Start the tool, kill it when 10 tensors are finished; the directory it leaves."""
    partial = output.with_name(f".{output.name}.partial")
    journal = layout.iteration_dir(partial, 0) / JOURNAL_FILE
    command = [sys.executable, "tools/convert_llama.py", "partition", *OPTIONS]
    process = subprocess.Popen(
        [*command, "--source", source, "--output", output],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            if journal.is_file() and journal.read_bytes().count(b"\n") > 10:
                break
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    return partial


def test_a_killed_conversion_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_llama(tmp_path / "hf", num_hidden_layers=16)
    output, whole = tmp_path / "moe", tmp_path / "whole"
    partial = kill_on_its_way(source, output)
    assert not output.exists()
    # What is finished must be used, not written again: its bytes and its time stay.
    weights = layout.iteration_dir(partial, 0)
    finished = weights / "__0_7.distcp"
    before = finished.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"unfinished conversion that differs in seed"):
        convert("partition", "--source", source, "--output", output, *OPTIONS, "--seed", 1)
    config = source / "config.json"
    changed = config.stat()
    os.utime(config, ns=(changed.st_atime_ns, changed.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"differs in files of source"):
        convert("partition", "--source", source, "--output", output, *OPTIONS)
    os.utime(config, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    capsys.readouterr()

    convert("partition", "--source", source, "--output", output, *OPTIONS)
    assert "going on with the unfinished files" in capsys.readouterr().out
    assert (output / "iter_0000000" / finished.name).stat().st_mtime_ns == before
    convert("partition", "--source", source, "--output", whole, *OPTIONS)
    assert files(output) == files(whole)
    assert not partial.exists()


def test_force_starts_anew(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with (
        pytest.raises(KeyboardInterrupt),
        layout.staged_directory(output, job={"seed": 1}) as folder,
    ):
        (folder / "weights").write_text("of seed 1")
        raise KeyboardInterrupt
    with layout.staged_directory(output, force=True, job={"seed": 2}) as folder:
        assert not (folder / "weights").exists()
        (folder / layout.MODEL_FILE).write_text("new")
    assert list(tmp_path.iterdir()) == [output]
    assert [path.name for path in output.iterdir()] == [layout.MODEL_FILE]


@pytest.mark.parametrize(
    ("error", "stays"), [(OSError("disk full"), True), (UserError("NaN"), False)]
)
def test_what_can_be_mended_outside_leaves_the_files(
    tmp_path: Path, error: Exception, stays: bool
) -> None:
    output = tmp_path / "model"
    with pytest.raises(type(error)), layout.staged_directory(output, job={}) as folder:
        (folder / "weights").write_text("half")
        raise error
    with layout.staged_directory(output, job={}) as folder:
        assert (folder / "weights").exists() == stays


def test_two_processes_do_not_fill_one_directory(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with layout.staged_directory(output, job={}) as folder:
        (folder / "weights").write_text("first")
        with (
            pytest.raises(UserError, match="another process is writing"),
            layout.staged_directory(output, force=True, job={}),
        ):
            raise AssertionError
    assert (output / "weights").read_text() == "first"


@dataclass
class Command:
    """Options as the tool's commands have them."""

    source: list[Path]
    output: Path = Path("moe")
    num_experts: int = 8
    force: bool = False


def test_a_job_is_its_options_and_the_files_it_reads(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b.gguf"]
    paths[0].mkdir()
    for file in (paths[0] / "model.safetensors", paths[0] / "notes.txt", paths[1]):
        file.write_text("1")
    job = layout.describe_job(Command(paths))
    assert layout.describe_job(Command(paths, Path("elsewhere"), force=True)) == job
    (paths[0] / "notes.txt").write_text("not read")
    assert layout.describe_job(Command(paths)) == job
    assert layout.describe_job(Command(paths, num_experts=4)) != job
    assert layout.describe_job(Command(paths[:1])) != job
    for file in (paths[0] / "model.safetensors", paths[1]):
        file.write_text("longer")
        assert layout.describe_job(Command(paths)) != job
        job = layout.describe_job(Command(paths))
