"""The sbatch scripts under a real SLURM: two emulated nodes on the loopback interface, on CPU.

Needs root and Debian's packages slurm-wlm and munge (apt-get install); elsewhere it is skipped.
Nothing of the machine's own SLURM is touched: configuration, state and sockets are in a temporary
directory, and ports are free ones.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
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
AuthInfo=socket={root}/munge/socket,cred_expire=5
# Jobs find their port by their number: those of another cluster on this machine have others.
FirstJobId={first_job}
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

    def __init__(self, root: Path, recipe: Path) -> None:
        self.root, self.recipe = root, recipe
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

    def submit(
        self,
        *words: Any,
        script: str = "train.sbatch",
        options: tuple[str, ...] = (),
        **environment: str,
    ) -> str:
        """Job number of `SCRIPT WORDS`."""
        output = f"--output={self.root}/job-%j.out"
        script = f"examples/slurm/{script}"
        return self("sbatch", "--parsable", output, *options, script, *words, **environment).strip()

    @functools.cached_property
    def refused(self) -> str:
        """Job of a recipe that cannot work, an arm of a study. Submitted once, and early: it runs
        while another job waits for its turn.
        """
        arms = self.root / "arms"
        arms.write_text(f"pretrain_moe.py --config '{self.recipe}' --global-batch-size 3\n")
        save = self.root / "study"
        return self.submit(f"@{arms}", "--save", save, options=("--array=1",))

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
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("slurm")
    munge = root / "munge"
    munge.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o600)
    ports = [free_port() for _ in range(3)]
    (root / "slurm.conf").write_text(
        CONFIGURATION.format(
            root=root,
            host=socket.gethostname(),
            port=ports[0],
            port1=ports[1],
            port2=ports[2],
            first_job=random.randrange(1, 9_000),
        )
    )
    for name in ("state", "spool-n1", "spool-n2"):
        (root / name).mkdir()
    cluster = Cluster(root, tiny_recipe)
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
    cluster.refused  # noqa: B018
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

    undisturbed = parse_run(["--config", str(tiny_recipe)])
    expected = run_ranks(2, train, undisturbed, STEPS)[0]
    assert cluster.wait_end(job) == "COMPLETED", cluster.output(job)
    said = cluster.output(job)
    assert "SIGUSR1: stopping after step" in said
    for start, iteration in enumerate((0, stopped, SAVE_INTERVAL), start=1):
        assert f"start {start}]" in said and f"from iteration {iteration}\n" in said
        for node in ("node0", "node1"):  # each rank's output is in a file of its own
            assert list((run / "logs" / f"{job}-{start - 1}" / node).rglob("stdout.log"))
    assert f"finished: {STEPS} of {STEPS}" in said
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert list(losses(run).values()) == expected


def test_a_recipe_that_cannot_work_fails_at_once_with_the_reason(cluster: Cluster) -> None:
    job = cluster.refused
    assert cluster.wait_end(job) == "FAILED"
    said = cluster.output(job)
    assert "study/arm-1 on 2 nodes" in said
    assert "global_batch_size=3 is not a multiple of" in said
    assert "not queueing again" in said
    assert cluster.field(job, "Restarts") == "0"


def test_an_unfit_node_is_drained_and_named(
    cluster: Cluster, tiny_recipe: Path, tmp_path: Path
) -> None:
    words = ("pretrain_moe.py", "--config", tiny_recipe, "--save", tmp_path)
    job = cluster.submit(*words, options=("--nodes=1",), MIN_SHM_GB="1000000")
    assert cluster.wait_end(job) == "FAILED"
    assert "unfit: n1: /dev/shm: " in cluster.output(job)
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


def test_an_array_runs_a_line_for_each_of_its_numbers(cluster: Cluster, tmp_path: Path) -> None:
    arms = tmp_path / "arms"
    code = "import sys; open(sys.argv[1], 'x').write(sys.argv[2])"
    arms.write_text("".join(f'-c "{code}" {tmp_path}/{n} "arm {n}"\n' for n in (1, 2, 3)))
    one_cpu = ("--cpus-per-task=1", "--mem=0")
    job = cluster.submit(f"@{arms}", script="tool.sbatch", options=("--array=1,3", *one_cpu))
    cluster.wait(job, "done", lambda: (tmp_path / "1").exists() and (tmp_path / "3").exists(), 60)
    assert ((tmp_path / "3").read_text(), (tmp_path / "2").exists()) == ("arm 3", False)


def test_upit_starts_on_a_node(cluster: Cluster) -> None:
    """As far as its own question; tests/examples/test_upit.py follows it to the end."""
    job = cluster.submit(script="upit.sbatch")
    assert cluster.wait_end(job) == "FAILED"
    assert "error: MODEL is not set" in cluster.output(job)
