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
RECIPE, TUNING = (DEMO.parent / "recipes" / f"{name}.yaml" for name in ("demo", "demo_tuning"))

# As the scripts find each other when they are run.
sys.path.insert(0, str(DEMO))
report, run, stages, tuning = (
    importlib.import_module(name) for name in ("report", "run", "stages", "tuning")
)


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


def test_the_plan_names_real_scripts_and_recipes_that_are_read(tmp_path: Path) -> None:
    plan = run.plan(tmp_path, RECIPE, TUNING, ["one", "two"], list(run.DATASETS))
    commands = [command for stage in plan for command in stage.commands]
    scripts = {word for command in commands for word in command if word.endswith(".py")}
    assert len(scripts) == 8 and all(Path(script).is_file() for script in scripts)
    trainings = [c for c in commands if "torch.distributed.run" in c]
    config, tuned = (parse_run(c[c.index("--config") :]) for c in trainings)
    for each in (config, tuned):
        assert each.parallel.expert_model_parallel_size == run.RANKS == 2
        final = f"iter_{each.training.train_iters:07d}"
        assert Path(each.checkpoint.save or "") / final in {p for s in plan for p in s.outputs}
    assert config.checkpoint.load == str(tmp_path / "moe")
    evaluations = [c for c in commands if any(word.endswith("evaluate.py") for word in c)]
    assert len(evaluations) == 2
    for command in evaluations:  # as the training measures, or the columns do not compare
        measured = parse_run(command[2:-2]).data
        assert measured.seq_length == config.data.seq_length
        assert measured.eval_samples == config.data.eval_samples
    assert plan[-1].commands[-1] == trainings[1] and tuned.data.task == "sft"
    assert tuned.checkpoint.load == config.checkpoint.save and len(run.DATASETS) >= 4
    # At least three decisions that are in force before the end.
    assert tuned.mixing.strategy == "router_load"
    assert tuned.training.train_iters >= 3 * tuned.mixing.interval + tuned.data.num_prefetch
    (talks,) = (c for c in commands if "sft" in c)
    assert talks[talks.index("--seq-length") + 1] == str(tuned.data.seq_length)
    assert talks[talks.index("--output") + 1] == tuned.data.data_dir


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


TUNING_ROWS = [
    {"kind": "valid", "step": 0, "loss": 2.5, "loss/a": 2.0, "loss/b": 3.0},
    {"kind": "mixing", "step": 3, "effective": 5, "weight/a": 0.4, "weight/b": 0.6},
    {"kind": "mixing", "step": 6, "effective": 8, "weight/a": 0.3, "weight/b": 0.7},
    {"kind": "valid", "step": 6, "loss": 2.0, "loss/a": 1.5, "loss/b": 2.5},
]


def test_the_tuning_is_shown(tmp_path: Path) -> None:
    steps, entries = tuning.tuned_sets(TUNING_ROWS)
    assert steps == [3, 6]
    assert entries == [("a", [0.5, 0.4, 0.3], 2.0, 1.5), ("b", [0.5, 0.6, 0.7], 3.0, 2.5)]
    lines = tuning.tuning_table(steps, entries).splitlines()
    assert lines[0].split("  ") == [
        *("weight of", "at first", "step 3", "step 6", "loss before", "after")
    ]
    assert lines[2].split() == ["a", "0.500", "0.400", "0.300", "2.000", "1.500"]
    tuning.draw_tuning(tmp_path / "new" / "tuning.png", steps, entries)
    assert (tmp_path / "new" / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_shortcomings_of_the_tuning() -> None:
    _, (first, second) = tuning.tuned_sets(TUNING_ROWS)
    assert tuning.tuning_shortcomings([first, second]) == []
    assert tuning.tuning_shortcomings([first, second._replace(after=3.4)]) == []
    (rose,) = tuning.tuning_shortcomings([first, second._replace(after=3.5)])
    assert "did not fall: 2.500 -> 2.500" in rose
    still = [each._replace(weights=[0.5, 0.505, 0.495]) for each in (first, second)]
    assert tuning.tuning_shortcomings(still) == ["the weights of the data sets did not move"]
