"""The launch scripts where there is no SLURM: their shell code, nodes started by hand, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*/*.sh")) + sorted(
    (ROOT / "examples").glob("*/*.sbatch")
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_code_is_sound(script: Path) -> None:
    name = script.relative_to(ROOT).as_posix()
    checks = [("bash", "-n", name)]
    if shellcheck := shutil.which("shellcheck", path=os.path.dirname(sys.executable)):
        checks.append((shellcheck, "-x", name))
    for check in checks:
        done = run(*check)
        assert done.returncode == 0, done.stdout


def test_two_nodes_without_slurm_save_on_a_signal(tiny_recipe: Path, tmp_path: Path) -> None:
    """Only the scripts get the signal, as under SLURM's proctrack/cgroup: they pass it on."""
    save = tmp_path / "run"
    environment = os.environ | {
        "PYTHON": sys.executable,
        "RANKS_PER_NODE": "1",
        "NNODES": "2",
        "MASTER_PORT": str(free_port()),
        "LOG_DIR": str(tmp_path / "logs"),
    }
    words = ["examples/launch/torchrun.sh", "pretrain_moe.py", "--config", str(tiny_recipe)]
    words += ["--save", str(save), "--train-iters", "100000"]
    outputs = [tmp_path / f"node-{node}.out" for node in range(2)]
    nodes = []
    for node, output in enumerate(outputs):
        with output.open("w") as file:
            nodes.append(
                subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=environment | {"NODE_RANK": str(node)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        end = time.monotonic() + 300
        while "step      3/" not in outputs[0].read_text():
            assert time.monotonic() < end and all(node.poll() is None for node in nodes)
            time.sleep(0.3)
        nodes[1].send_signal(signal.SIGUSR1)  # one node that hears it stops all
        assert [node.wait(120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            if node.poll() is None:
                node.terminate()
                node.wait(60)
    said = outputs[0].read_text()
    assert "SIGUSR1: stopping after step" in said
    latest = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert f"stopping after step {latest}\n" in said
    for node in range(2):
        assert list((tmp_path / "logs" / f"node{node}").rglob("stdout.log"))


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("none", "-N1 tool x"),
        ("apptainer", "-N1 apptainer exec --nv --bind a,b IMG tool x"),
        ("pyxis", "-N1 --container-image=IMG --container-mounts=a:a,b:b"),
    ],
)
def test_the_command_inside_each_kind_of_container(container: str, expected: str) -> None:
    """What srun is called with (there is no container engine here to run it)."""
    source = 'srun() { echo "$@"; }; exec() { "$@"; }; source examples/slurm/cluster.sh'
    done = run(
        *("bash", "-c", f"{source}; srun_inside -N1 -- tool x"),
        CONTAINER=container,
        IMAGE="IMG",
        MOUNTS="a,b",
    )
    assert done.stdout.startswith(expected), done.stdout


def test_a_launch_without_a_program_says_what_to_do() -> None:
    done = run("examples/launch/torchrun.sh")
    assert done.returncode == 2 and "no program named" in done.stdout
