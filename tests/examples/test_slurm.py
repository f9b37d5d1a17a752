"""The sbatch scripts under a real SLURM: two emulated nodes on the loopback interface, on CPU.

Needs root and Debian's packages slurm-wlm and munge (apt-get install); elsewhere it is skipped.
Nothing of the machine's own SLURM is touched: configuration, state and sockets are in a temporary
directory, and ports are free ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import free_port, run_ranks
from training.runs import losses as train

from megatron_ext.recipe import parse_run

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_INTERVAL = 180, 100  # of the recipe
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
]

CONFIGURATION = """\
ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# A job that queues again waits until credentials have expired (120 s by default).
AuthInfo=socket={root}/munge/socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE
"""


class Cluster:
    """A running SLURM and what its user does with it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PYTHON": sys.executable,
            "GPUS_PER_NODE": "0",
            "MIN_SAVE_GB": "1",
            "WANDB_MODE": "offline",
        }

    def __call__(self, *command: Any, check: bool = True, **environment: str) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def submit(self, *words: Any, options: tuple[str, ...] = (), **environment: str) -> str:
        """Job number of `train.sbatch WORDS`."""
        output = f"--output={self.root}/job-%j.out"
        script = "examples/slurm/train.sbatch"
        return self("sbatch", "--parsable", output, *options, script, *words, **environment).strip()

    def field(self, job: str, name: str) -> str:
        for word in self("scontrol", "show", "job", job).split():
            if word.startswith(name + "="):
                return word.removeprefix(name + "=")
        raise AssertionError(f"job {job} has no {name}")

    def output(self, job: str) -> str:
        file = self.root / f"job-{job}.out"
        return file.read_text() if file.exists() else ""

    def wait(self, job: str, what: str, met: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < end, f"not {what}:\n{self.output(job)}\n{self.logs()}"
            time.sleep(0.3)

    def wait_end(self, job: str) -> str:
        """Its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(job, "ended", lambda: self.field(job, "JobState") in over)
        return self.field(job, "JobState")

    def kill_processes_of(self, node: str) -> None:
        """What a node that loses power does to the jobs on it."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                place = process.environ()
                ours = place.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and place.get("SLURMD_NODENAME") == node:
                    process.kill()

    def logs(self) -> str:
        texts = (file.read_text().splitlines()[-15:] for file in self.root.glob("slurm*.log"))
        return "\n".join(line for text in texts for line in text)


@contextlib.contextmanager
def daemon(*command: Any, cluster: Cluster, log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=cluster.environment, stdout=output, stderr=output
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    munge = root / "munge"
    munge.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o600)
    ports = [free_port() for _ in range(3)]
    (root / "slurm.conf").write_text(
        CONFIGURATION.format(
            root=root, host=socket.gethostname(), port=ports[0], port1=ports[1], port2=ports[2]
        )
    )
    for name in ("state", "spool-n1", "spool-n2"):
        (root / name).mkdir()
    cluster = Cluster(root)
    options = [
        f"--{name}={munge}/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    with contextlib.ExitStack() as daemons:
        for name, *command in (
            ("munged", "munged", "--foreground", "--force", f"--key-file={munge}/key", *options),
            ("controller", "slurmctld", "-D", "-c"),
            ("n1", "slurmd", "-D", "-N", "n1"),
            ("n2", "slurmd", "-D", "-N", "n2"),
        ):
            log = root / f"{name}.log"
            daemons.enter_context(daemon(*command, cluster=cluster, log=log))
        idle = "n[1-2]|idle"
        cluster.wait("", "nodes up", lambda: idle in cluster("sinfo", "-ho%N|%T", check=False), 40)
        yield cluster


def losses(run: Path) -> dict[int, float]:
    """Loss of every step so far; a step that is there twice would show."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    assert len(dict(steps)) == len(steps)
    return dict(steps)


def latest(run: Path) -> int:
    """Iteration of the newest checkpoint."""
    file = run / "latest_checkpointed_iteration.txt"
    return int(file.read_text()) if file.exists() else 0


def test_a_job_lives_through_its_limit_and_a_failed_node(
    cluster: Cluster, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Its losses are those of a training that nothing happened to."""
    run = tmp_path / "run"
    job = cluster.submit("pretrain_moe.py", "--config", tiny_recipe, "--save", run)
    cluster.wait(job, "training", lambda: len(losses(run)) >= 3)
    # What --signal=B:USR1@300 does five minutes before the limit.
    cluster("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "queued again", lambda: cluster.field(job, "Restarts") == "1")
    stopped = latest(run)
    assert 3 <= stopped < SAVE_INTERVAL and stopped == max(losses(run))

    cluster.wait(job, "at its next checkpoint", lambda: latest(run) == SAVE_INTERVAL)
    cluster.kill_processes_of("n2")
    cluster("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.wait(job, "queued again", lambda: cluster.field(job, "Restarts") == "2")
    # A node that has answered meanwhile is up already, and refuses.
    cluster("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)

    assert cluster.wait_end(job) == "COMPLETED", cluster.output(job)
    said = cluster.output(job)
    assert "SIGUSR1: stopping after step" in said
    for start, iteration in enumerate((0, stopped, SAVE_INTERVAL), start=1):
        assert f"start {start}]" in said and f"from iteration {iteration}\n" in said
        for node in ("node0", "node1"):  # each rank's output is in a file of its own
            assert list((run / "logs" / f"{job}-{start - 1}" / node).rglob("stdout.log"))
    assert f"finished: {STEPS} of {STEPS}" in said
    assert list(losses(run)) == list(range(1, STEPS + 1))
    undisturbed = parse_run(["--config", str(tiny_recipe)])
    assert list(losses(run).values()) == run_ranks(2, train, undisturbed, STEPS)[0]


def test_a_recipe_that_cannot_work_fails_at_once_with_the_reason(
    cluster: Cluster, tiny_recipe: Path, tmp_path: Path
) -> None:
    job = cluster.submit(
        "pretrain_moe.py", "--config", tiny_recipe, "--save", tmp_path, "--global-batch-size", 3
    )
    assert cluster.wait_end(job) == "FAILED"
    said = cluster.output(job)
    assert "global_batch_size=3 is not a multiple of" in said
    assert "not queueing again" in said
    assert cluster.field(job, "Restarts") == "0"


def test_an_unfit_node_is_drained_and_named(
    cluster: Cluster, tiny_recipe: Path, tmp_path: Path
) -> None:
    words = ("pretrain_moe.py", "--config", tiny_recipe, "--save", tmp_path)
    job = cluster.submit(*words, options=("--nodes=1",), MIN_SHM_GB="1000000")
    assert cluster.wait_end(job) == "FAILED"
    assert "/dev/shm has" in cluster.output(job)
    assert "submit again with --exclude=n1" in cluster.output(job)

    job = cluster.submit(
        *words, options=("--nodes=1",), MIN_SHM_GB="1000000", DRAIN_BAD_NODES="yes"
    )
    try:
        cluster.wait(job, "drained", lambda: "drain" in cluster("sinfo", "-hNnn1", "-o%T"))
        cluster.wait(job, "queued again", lambda: cluster.field(job, "Restarts") == "1")
    finally:
        cluster("scancel", job)
        cluster("scontrol", "update", "NodeName=n1", "State=RESUME", check=False)
