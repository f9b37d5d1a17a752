"""The demo's frame: stages that are not done twice, the plan, the tables and the picture."""

import importlib
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import UserError
from megatron_ext.recipe import parse_run

DEMO = Path(__file__).parents[2] / "examples" / "demo"
RECIPE = DEMO.parent / "recipes" / "demo.yaml"

# As the scripts find each other when they are run.
sys.path.insert(0, str(DEMO))
report, run, stages = (importlib.import_module(name) for name in ("report", "run", "stages"))


def append(path: Path, text: str, code: str = "") -> tuple[str, ...]:
    """A command that adds `text` to a file, so that a second run of it can be seen."""
    return (sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r}); {code}")


def make(root: Path, name: str, text: str, code: str = "", **more: Any) -> Any:
    path = root / name
    return stages.Stage(name, f"makes {name}", (append(path, text, code),), (path,), **more)


def test_finished_stages_are_skipped_and_changed_ones_start_anew(tmp_path: Path) -> None:
    def go(first: str, second: str) -> list[bool]:
        plan = [make(tmp_path, "one", first), make(tmp_path, "two", second)]
        return [done.skipped for done in stages.run_stages(plan, tmp_path)]

    assert go("a", "b") == [False, False]
    assert go("a", "b") == [True, True]
    assert go("a", "c") == [True, False]
    assert (tmp_path / "two").read_text() == "c"  # not "bc": what the old command made is gone
    assert go("A", "c") == [False, False]  # the second reads what the first writes
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["A", "c"]
    (tmp_path / "two").unlink()
    assert go("A", "c") == [True, False]


def test_an_interrupted_stage_goes_on_with_what_it_has_written(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    code = f"import os, sys; sys.exit(os.path.exists({str(broken)!r}))"
    plan = [make(tmp_path, "one", "a", code)]
    with pytest.raises(UserError, match="makes one.*exit code 1"):
        stages.run_stages(plan, tmp_path)
    broken.unlink()
    assert not stages.run_stages(plan, tmp_path)[0].skipped
    assert (tmp_path / "one").read_text() == "aa"


def test_a_stage_without_its_output_is_not_finished(tmp_path: Path) -> None:
    stage = stages.Stage("x", "x", (append(tmp_path / "y", "a"),), (tmp_path / "x",))
    for _ in range(2):
        with pytest.raises(UserError, match="ended without .*x"):
            stages.run_stages([stage], tmp_path)


def test_settings_files_decide_too(tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    plan = [make(tmp_path, "one", "a", settings=(settings,))]
    for content, skipped in (("1", False), ("1", True), ("2", False)):
        settings.write_text(content)
        assert stages.run_stages(plan, tmp_path)[0].skipped is skipped


def test_redirected_output_is_whole_or_absent(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    target = tmp_path / "new" / "out.txt"

    def stage(code: int) -> Any:
        program = f"import sys; print('result'); print('seen', file=sys.stderr); sys.exit({code})"
        command = (sys.executable, "-c", program, ">", str(target))
        return stages.Stage("out", "out", (command,), (target,))

    with pytest.raises(UserError):
        stages.run_stages([stage(3)], tmp_path)
    assert not target.exists()
    stages.run_stages([stage(0)], tmp_path)
    assert target.read_text() == "result\n"
    assert b"seen\n" in capfdbinary.readouterr().out


def test_silence_is_filled_with_dots(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    reader, writer = os.pipe()
    shell = "echo begin; sleep 0.5; echo end"
    process = subprocess.Popen(["sh", "-c", shell], stdout=writer)
    os.close(writer)
    stages._pass_on(reader, every=0.1)
    process.wait()
    os.close(reader)
    shown = capfdbinary.readouterr().out
    assert shown.startswith(b"begin\n..") and shown.endswith(b".\nend\n")


def test_a_stopped_demo_lets_its_command_save(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    child = (
        "import signal, sys, time\n"
        f"def save(*_): open({str(saved)!r}, 'w').write('x'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready'); time.sleep(60)"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(DEMO)!r})\n"
        "from pathlib import Path; from stages import Stage, run_stages\n"
        f"stage = Stage('s', 's', (({sys.executable!r}, '-c', {child!r}),), ())\n"
        f"run_stages([stage], Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # A shell without job control has its background commands ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while process.stdout.readline() != b"ready\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert saved.exists()


def test_peak_memory_sees_children() -> None:
    with stages.PeakMemory(interval=0.02) as memory:
        alone = memory.peak
        program = "import time; data = bytearray(200_000_000); time.sleep(0.5)"
        subprocess.run([sys.executable, "-c", program])
    assert memory.peak > alone + 150e6


def test_the_plan_names_real_scripts_and_a_recipe_that_is_read(tmp_path: Path) -> None:
    plan = run.plan(tmp_path, RECIPE, ["one", "two"])
    commands = [command for stage in plan for command in stage.commands]
    scripts = {word for command in commands for word in command if word.endswith(".py")}
    assert len(scripts) == 7 and all(Path(script).is_file() for script in scripts)
    (training,) = (c for c in commands if "torch.distributed.run" in c)
    options = training[training.index(str(run.ROOT / "pretrain_moe.py")) + 1 :]
    config = parse_run(options)
    assert config.parallel.expert_model_parallel_size == run.RANKS == 2
    assert config.checkpoint.load == str(tmp_path / "moe")
    evaluations = [c for c in commands if any(word.endswith("evaluate.py") for word in c)]
    assert len(evaluations) == 2
    for command in evaluations:  # as the training measures, or the columns do not compare
        measured = parse_run(command[2:-2]).data
        assert measured.seq_length == config.data.seq_length
        assert measured.eval_samples == config.data.eval_samples
    final = f"iter_{config.training.train_iters:07d}"
    assert any(path.name == final for stage in plan for path in stage.outputs)


LOSSES = {"dense": {"a": 1.0, "b": 2.0}, "partitioned": {"a": 9.0, "b": 8.0}}
ROWS = [
    {"kind": "train", "step": 1, "loss": 7.0, "loss/a": 7.0},
    {"kind": "valid", "step": 1, "loss": 6.0, "loss/a": 6.0, "loss/b": 6.0},
    {"kind": "train", "step": 2, "loss": 5.0, "loss/a": 5.0, "loss/b": 5.5},
    {"kind": "valid", "step": 2, "loss": 4.0, "loss/a": 4.0, "loss/b": 3.0},
]


def test_perplexities_come_from_the_last_evaluation() -> None:
    entries = report.perplexities(LOSSES["dense"], LOSSES["partitioned"], ROWS)
    assert [entry.domain for entry in entries] == ["a", "b"]
    assert entries[0][1:] == pytest.approx([math.e, math.exp(9), math.exp(4)])
    assert report.mean(entries).trained == pytest.approx((math.exp(4) + math.exp(3)) / 2)


@pytest.mark.parametrize(
    ("trained", "missed"),
    [((20.0, 30.0), 0), ((50.0, 50.0), 0), ((51.0, 50.0), 1), ((300.0, 1.0), 2)],
)
def test_shortcomings_are_the_demos_promise(trained: tuple[float, float], missed: int) -> None:
    entries = [
        report.Perplexities(name, 10.0, before, after)
        for name, before, after in zip("ab", (200.0, 300.0), trained, strict=True)
    ]
    assert len(report.shortcomings(entries)) == missed


def test_tables_line_up() -> None:
    entries = [report.Perplexities("code", 9.5, 1_234_567.0, 100.0)]
    lines = report.perplexity_table(entries).splitlines()
    assert lines[2].split() == ["code", "9.5", "1,234,567", "100", "12,346"]
    assert lines[3].split()[0] == "mean"
    for title in ("dense", "after partition", "after training"):
        end = lines[0].index(title) + len(title)
        assert lines[2][end - 1].isdigit() and lines[2][end : end + 1] in ("", " ")


@pytest.mark.parametrize("domains", [1, 2, 7, 8])
def test_the_picture_is_drawn_for_any_number_of_domains(tmp_path: Path, domains: int) -> None:
    names = [f"domain{n}" for n in range(domains)]
    losses = {name: 3.0 for name in names}
    rows = [
        {"kind": kind, "step": step, **{f"loss/{name}": 9.0 - step for name in names}}
        for step in (1, 2)
        for kind in ("train", "valid")
    ]
    report.draw(tmp_path / "new" / "losses.png", losses, losses, rows)
    assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")
