"""tools/doctor.py: what scripts read from it, and its checks on machines made for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, ROOT, run, torchrun

from megatron_ext.doctor import machine, software
from megatron_ext.doctor.finding import Finding, Severity, report

FINE, LIMITS, STOPS = Severity.FINE, Severity.LIMITS, Severity.STOPS


def test_two_ranks_measure_their_collectives(tmp_path: Path) -> None:
    """Bus bandwidths as nccl-tests: on two ranks all of all_reduce's bytes leave a rank, half of
    the others'.
    """
    words = ("tools/doctor.py", "--gpus", 0, "--folder", tmp_path, "--min-tmp-gb", 0)
    # 1 and 3 MiB; an exit code of 1 for too slow a bus would be torchrun's failure.
    said = run(*torchrun(2), ROOT / words[0], *words[1:], "--sizes-mib", 1, 3, "--json")
    answer = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert answer["severity"] == FINE and len(answer["nodes"]) == 1
    rows = {(row["collective"], row["bytes"] // 2**20): row for row in answer["bandwidth"]}
    names = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    assert set(rows) == {(name, size) for name in names for size in (1, 3)}
    for (name, _), row in rows.items():
        assert row["ranks"] == 2 and row["seconds"] > 0
        assert row["algorithm"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        share = 1.0 if name == "all_reduce" else 0.5
        assert row["bus"] == pytest.approx(share * row["algorithm"])


@pytest.mark.parametrize(
    ("words", "code", "verdict"),
    [
        (("--gpus", "0"), 0, "fit: n7\n"),
        (("--gpus", "1"), 2, "unfit: n7: GPUs: "),
        (("--gpus", "0", "--min-shm-gb", "1e9"), 2, "unfit: n7: /dev/shm: "),
    ],
)
def test_scripts_get_a_verdict_and_an_exit_code(
    words: tuple[str, ...], code: int, verdict: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "doctor.py", "--verdict", "--folder", tmp_path, *words],
        env=ENVIRONMENT | {"SLURMD_NODENAME": "n7", "PATH": str(tmp_path)},  # no nvidia-smi there
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith(verdict) and done.stdout.count("\n") == 1
    assert [file for file in tmp_path.iterdir() if file.name.startswith(".doctor-")] == []


def test_a_verdict_names_only_what_is_worst() -> None:
    slow, bad = Finding("Apex", "missing", LIMITS, "x"), Finding("GPUs", "3 of 8", STOPS, "y")
    assert report([Finding("CPU", "96")]).verdict().startswith("fit: ")
    assert report([slow]).verdict().endswith(": Apex: missing")
    assert report([slow, bad]).verdict().endswith(": GPUs: 3 of 8")
    assert report([slow, bad]).severity == STOPS


@pytest.mark.parametrize(
    ("line", "severity"),
    [
        ("torch>=2.9,<3", FINE),
        ("torch>=1,<2", LIMITS),  # runs perhaps, but nobody has tried
        ("surely-not-installed>=1", STOPS),
        ("surely-not-installed>=1; python_version < '3'", None),
    ],
)
def test_versions_are_held_against_the_tested_ones(line: str, severity: Severity | None) -> None:
    found = software.check_requirement(line)
    assert (found.severity if found else None) == severity


def test_every_dependency_of_the_project_is_looked_at() -> None:
    names = {finding.name for finding in software.check_packages()}
    assert {"Python", "torch", "megatron-core", "wandb"} <= names
    assert software.OPTIONAL.keys() <= names


NVIDIA_SMI = """\
#!/bin/sh
printf '0, NVIDIA H100 80GB HBM3, 81559, 0\\n'
printf '1, {kind}, 81559, {errors}\\n'
"""


@pytest.mark.parametrize(
    ("kind", "errors", "wanted", "severity", "said"),
    [
        ("NVIDIA H100 80GB HBM3", "0", 2, FINE, "2 x NVIDIA H100 80GB HBM3, 80 GiB each"),
        ("NVIDIA H100 80GB HBM3", "[N/A]", None, FINE, "2 x NVIDIA"),
        ("NVIDIA H100 80GB HBM3", "3", 2, STOPS, "3 uncorrected memory errors"),
        ("NVIDIA A100-SXM4-80GB", "0", 2, LIMITS, "A100-SXM4-80GB and NVIDIA H100"),
        ("NVIDIA H100 80GB HBM3", "0", 8, STOPS, "2 of 8"),
    ],
)
def test_what_the_driver_says_of_gpus(
    kind: str,
    errors: str,
    wanted: int | None,
    severity: Severity,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(kind=kind, errors=errors))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpus, findings = machine.check_gpus(wanted)
    assert gpus == (0 if wanted == 8 else 2)
    assert max(finding.severity for finding in findings) == severity
    assert any(said in finding.found for finding in findings)


def test_the_checkpoint_folder(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in machine.check_folder(str(tmp_path), 0)}
    assert findings["renaming"].severity == FINE
    assert findings["room for checkpoints"].severity == FINE
    assert "MB/s" in findings["writing and fsync"].found
    (tmp_path / "file").touch()
    (unusable,) = machine.check_folder(str(tmp_path / "file" / "below"), 0)
    assert unusable.severity == STOPS
    full = machine.check_folder(str(tmp_path), 1e9)
    assert max(finding.severity for finding in full) == STOPS


def test_memory_is_not_kept_by_a_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("dev / ext4 rw 0 0\nx /data lustre rw 0 0\nt /data/my\\040tmp tmpfs rw 0 0\n")
    assert machine.file_system(Path("/data/runs"), mounts) == ("lustre", "/data")
    assert machine.file_system(Path("/data/my tmp/run"), mounts) == ("tmpfs", "/data/my tmp")
    assert machine.file_system(Path("/datasets"), mounts) == ("ext4", "/")


def test_infiniband_needs_locked_memory(tmp_path: Path) -> None:
    for port, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        folder = tmp_path / "mlx5_0" / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    assert machine.infiniband_ports(tmp_path) == 1
    assert machine.check_infiniband(1, 2).severity == STOPS
    assert machine.check_infiniband(1, 1).severity == FINE
