"""All checks of a node, alone or as a job of many."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

from megatron_ext.doctor import machine, software
from megatron_ext.doctor.finding import Finding, Report, Severity, report


@dataclass
class Needs:
    """What a run will ask of a node."""

    folder: str = "."
    """Where checkpoints go."""
    gpus: int | None = None
    """GPUs that a run will use on this node; 0: it runs on CPU; none: what is here."""
    min_shm_gb: float = 1.0
    """Room in /dev/shm, which NCCL uses between the GPUs of a node."""
    min_tmp_gb: float = 1.0
    """Room in /tmp."""
    min_folder_gb: float = 1.0
    """Room in the folder: 7B parameters with optimizer state take 95 GB a checkpoint."""
    infiniband_ports: int = 0
    """InfiniBand or RoCE ports that must be up."""
    sizes_mib: tuple[int, ...] = (1, 16, 128)
    """(torchrun) Sizes of the collectives' buffers."""
    min_bus_gb: float = 0.0
    """(torchrun) GB/s on the bus that all_reduce must reach; less is reported as a limit."""


def examine(needs: Needs) -> Report:
    """This node."""
    gpus, findings = machine.check_gpus(needs.gpus)
    findings += software.check_packages()
    if gpus:
        findings += software.check_gpu_packages() + software.check_torch(gpus)
    findings += machine.check_cpu(gpus)
    bus_error = "NCCL stops with a bus error: --shm-size for docker, or a larger tmpfs"
    findings.append(machine.check_room("/dev/shm", "/dev/shm", needs.min_shm_gb, bus_error))
    full = "compilers and loaders write there: clear it"
    findings.append(machine.check_room("/tmp", "/tmp", needs.min_tmp_gb, full))
    ports = machine.infiniband_ports()
    findings.append(machine.check_infiniband(ports, needs.infiniband_ports))
    findings += machine.check_limits(has_infiniband=ports > 0)
    findings += machine.check_folder(needs.folder, needs.min_folder_gb)
    return report(findings)


def examine_together(needs: Needs) -> tuple[list[Report], list]:
    """Every node, and the collectives between all ranks (collective, under torchrun).

    Returns:
        Reports, one for each node, and the `bandwidth.Bandwidth` of every collective and size.
    """
    import torch
    import torch.distributed as dist

    from megatron_ext.doctor import bandwidth

    # Newer names of two collectives, which the oldest supported torch does not have.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    uses_gpus = needs.gpus != 0 and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if uses_gpus else torch.device("cpu")
    if uses_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_gpus else "gloo")
    gathered: list[Report | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, examine(needs) if local_rank == 0 else None)
    reports = [found for found in gathered if found is not None]
    rows = list(bandwidth.measure(needs.sizes_mib, device)) if len(gathered) > 1 else []
    reached = max((row.bus for row in rows if row.collective == "all_reduce"), default=0.0)
    if rows and reached < needs.min_bus_gb:
        slow = Finding(
            "all_reduce",
            f"{reached:.2f} of {needs.min_bus_gb:g} GB/s on the bus",
            Severity.LIMITS,
            "NCCL_DEBUG=INFO shows which links it uses (NVLink, NET/IB, NET/Socket)",
        )
        reports.append(Report("all ranks", (slow,)))
    dist.barrier()
    dist.destroy_process_group()
    return reports, rows
