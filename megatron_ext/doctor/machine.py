"""What a node has: GPUs, cores, shared memory, limits, network adapters, room for checkpoints."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from megatron_ext.doctor.finding import Finding, Severity

NVIDIA_SMI = ("index", "name", "memory.total", "ecc.errors.uncorrected.volatile.total")
ANSWER_SECONDS = 60
"""A GPU that fell off the bus can make nvidia-smi hang."""

WRITTEN_MIB = 64
"""Of the write test: more than a controller's small cache notices, less than a second on a disk."""

SLOW_MB_PER_SECOND = 100.0
"""A 7B model's weights and optimizer state (95 GB) take a quarter of an hour below this."""

VOLATILE = ("tmpfs", "ramfs")


def check_gpus(wanted: int | None) -> tuple[int, list[Finding]]:
    """GPUs that the driver shows, their memory and uncorrected errors.

    Args:
        wanted: how many a run will use here; 0: none are looked for; None: what is there.

    Returns:
        (number of GPUs to be used, findings).
    """
    if wanted == 0:
        return 0, [Finding("GPUs", "none wanted: CPU and gloo")]
    try:
        listing = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except FileNotFoundError:
        return _no_gpus(wanted, "no nvidia-smi")
    except subprocess.TimeoutExpired:
        reason = f"nvidia-smi gave no answer in {ANSWER_SECONDS} s"
        return 0, [Finding("GPUs", reason, Severity.STOPS, "reset or replace the node")]
    if listing.returncode:
        return _no_gpus(wanted, (listing.stdout + listing.stderr).strip() or "nvidia-smi failed")
    rows = [[part.strip() for part in line.split(",")] for line in listing.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(NVIDIA_SMI) and row[0].isdigit()]
    if len(rows) < (wanted or 1):
        return _no_gpus(wanted, f"{len(rows)} of {wanted or 1}")
    findings = []
    kinds = sorted({row[1] for row in rows})
    memory = min(int(row[2]) for row in rows) / 1024
    found = f"{len(rows)} x {' and '.join(kinds)}, {memory:.0f} GiB each"
    if len(kinds) > 1:
        slow = "a step waits for the slowest"
        findings.append(Finding("GPUs", found, Severity.LIMITS, slow))
    else:
        findings.append(Finding("GPUs", found))
    for index, _, _, errors in rows:  # cards without ECC answer [N/A]
        if errors.isdigit() and int(errors):
            problem = f"{errors} uncorrected memory errors"
            findings.append(Finding(f"GPU {index}", problem, Severity.STOPS, "reset or replace it"))
    return len(rows), findings


def _no_gpus(wanted: int | None, found: str) -> tuple[int, list[Finding]]:
    if wanted is None:
        cost = "runs are on CPU with gloo: for tests, conversion and small models"
        return 0, [Finding("GPUs", f"none ({found})", Severity.LIMITS, cost)]
    text = found if found.endswith(f"of {wanted}") else f"none of {wanted} ({found})"
    return 0, [Finding("GPUs", text, Severity.STOPS, "look at nvidia-smi and at the job's request")]


def check_cpu(gpus: int) -> list[Finding]:
    """Cores that this process may use, and memory."""
    import psutil

    threads = len(os.sched_getaffinity(0))
    cores = psutil.cpu_count(logical=False) or threads
    total = psutil.virtual_memory().total / 2**30
    found = f"{threads} threads of {cores} cores, OMP_NUM_THREADS={_environment('OMP_NUM_THREADS')}"
    if threads < 2 * gpus:
        cost = f"a rank and its data loading want 2 threads each: {2 * gpus} for {gpus} GPUs"
        return [Finding("CPU", found, Severity.LIMITS, cost), _memory(total)]
    return [Finding("CPU", found), _memory(total)]


def _memory(gib: float) -> Finding:
    if gib < 8:
        cost = "the demo needs 8 GiB, converting a 7B model 12"
        return Finding("memory", f"{gib:.0f} GiB", Severity.LIMITS, cost)
    return Finding("memory", f"{gib:.0f} GiB")


def _environment(name: str) -> str:
    return os.environ.get(name, "(unset)")


def check_room(name: str, folder: str, min_gb: float, cost: str) -> Finding:
    """Free space of a folder in GB (1e9 bytes)."""
    try:
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Finding(name, f"cannot be read: {error.strerror}", Severity.STOPS, cost)
    if free < min_gb:
        return Finding(name, f"{free:.1f} of {min_gb:g} GB free", Severity.STOPS, cost)
    return Finding(name, f"{free:.1f} GB free")


def check_limits(has_infiniband: bool) -> list[Finding]:
    """Limits of this process, which its ranks inherit."""
    findings = []
    for name, kind, least, severity, cost in (
        (
            "locked memory",
            resource.RLIMIT_MEMLOCK,
            2**33 if has_infiniband else 0,
            Severity.STOPS,
            "NCCL cannot register memory with InfiniBand: ulimit -l unlimited (also in SLURM's "
            "own limits: PropagateResourceLimits)",
        ),
        (
            "open files",
            resource.RLIMIT_NOFILE,
            1024,
            Severity.LIMITS,
            "a data set is two files and a rank a connection: ulimit -n 65536",
        ),
        (
            "processes and threads",
            resource.RLIMIT_NPROC,
            4096,
            Severity.LIMITS,
            "ranks start dozens of threads each: ulimit -u 65536",
        ),
    ):
        soft, _ = resource.getrlimit(kind)
        unlimited = soft == resource.RLIM_INFINITY
        found = "unlimited" if unlimited else f"{soft}"
        if unlimited or soft >= least:
            findings.append(Finding(name, found))
        else:
            findings.append(Finding(name, found, severity, cost))
    return findings


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> int:
    """Ports of InfiniBand or RoCE adapters that are up."""
    states = root.glob("*/ports/*/state")
    return sum("ACTIVE" in state.read_text() for state in states)


def check_infiniband(active: int, wanted: int) -> Finding:
    if active < wanted:
        cost = "traffic between nodes would fall back to fewer adapters, or to TCP"
        return Finding("InfiniBand", f"{active} of {wanted} ports up", Severity.STOPS, cost)
    return Finding("InfiniBand", f"{active} ports up")


def check_folder(folder: str, min_gb: float) -> list[Finding]:
    """Where checkpoints go: kind of file system, room, speed, and whether renaming works.

    A checkpoint is written as NAME.incomplete and renamed when it is whole; both must be on one
    file system, which overlays and mount points inside a folder can break.
    """
    path = Path(folder)
    name = "checkpoint folder"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as scratch:
            speed = _write_speed(Path(scratch) / "written")
            partial, final = Path(scratch) / "step.incomplete", Path(scratch) / "step"
            partial.mkdir()
            (partial / "file").touch()
            os.replace(partial, final)
            whole = (final / "file").exists() and not partial.exists()
    except OSError as error:
        return [Finding(name, f"{folder}: {error.strerror}", Severity.STOPS, "choose another")]
    kind, place = file_system(path)
    findings = [
        Finding(
            name,
            f"{place} ({kind})",
            Severity.LIMITS if kind in VOLATILE else Severity.FINE,
            "checkpoints are gone when the machine stops" if kind in VOLATILE else "",
        ),
        check_room("room for checkpoints", folder, min_gb, "delete old runs or choose another"),
        Finding(
            "writing and fsync",
            f"{speed:.0f} MB/s ({WRITTEN_MIB} MiB)",
            Severity.FINE if speed >= SLOW_MB_PER_SECOND else Severity.LIMITS,
            "" if speed >= SLOW_MB_PER_SECOND else "saves hold the run up: try --async-save True",
        ),
        Finding(
            "renaming",
            "at once" if whole else "copies",
            Severity.FINE if whole else Severity.STOPS,
            "" if whole else "half a checkpoint could look like a whole one",
        ),
    ]
    return findings


def _write_speed(path: Path) -> float:
    """MB/s (1e6 bytes) of one writer until the data is on the device."""
    block = os.urandom(2**20)  # what compresses would be written faster
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(WRITTEN_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return WRITTEN_MIB * 2**20 / 1e6 / seconds


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> tuple[str, str]:
    """(kind, mount point) of a path: the longest mount point that it begins with."""
    whole = path.resolve()
    best = ("unknown", "?")
    for line in mounts.read_text().splitlines():
        _, place, kind = line.split()[:3]
        place = place.replace("\\040", " ")
        if whole.is_relative_to(place) and len(place) >= len(best[1]):
            best = (kind, place)
    return best
