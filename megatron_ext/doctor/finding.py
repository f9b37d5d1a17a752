"""What a check found, and how bad it is."""

from __future__ import annotations

import enum
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


class Severity(enum.IntEnum):
    """The largest of a report is the exit code of tools/doctor.py."""

    FINE = 0
    LIMITS = 1
    """A run is slower or smaller than it could be."""
    STOPS = 2
    """A run cannot work, or loses what it saved."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    """What was looked at."""
    found: str
    severity: Severity = Severity.FINE
    consequence: str = ""
    """What it costs, or what to do about it."""

    def __str__(self) -> str:
        mark = {Severity.FINE: "ok", Severity.LIMITS: "slow", Severity.STOPS: "STOP"}[self.severity]
        line = f"{mark:>4}  {self.name:<24} {self.found}"
        return f"{line}\n{'':6}{'':24} -> {self.consequence}" if self.consequence else line


@dataclass(frozen=True)
class Report:
    """All findings of one node."""

    host: str
    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        return max((finding.severity for finding in self.findings), default=Severity.FINE)

    def verdict(self) -> str:
        """One line that scripts can read: `fit: NODE`, or `limited:` or `unfit:` with the reasons.

        `unfit:` names only what stops a run.
        """
        worst = self.severity
        reasons = [f"{f.name}: {f.found}" for f in self.findings if f.severity == worst]
        word = {Severity.FINE: "fit", Severity.LIMITS: "limited", Severity.STOPS: "unfit"}[worst]
        return f"{word}: {self.host}" + (f": {'; '.join(reasons)}" if worst else "")


def report(findings: Sequence[Finding]) -> Report:
    """Of this node, under SLURM's name for it where there is one."""
    return Report(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), tuple(findings))


def as_json(reports: Sequence[Report], bandwidth: Sequence[Any]) -> str:
    """`{severity, nodes: [{severity, host, findings}], bandwidth: [...]}`, rates in GB/s."""
    nodes = [{"severity": node.severity, **asdict(node)} for node in reports]
    severity = max(node.severity for node in reports)
    rows = [{**asdict(row), "algorithm": row.algorithm, "bus": row.bus} for row in bandwidth]
    return json.dumps({"severity": severity, "nodes": nodes, "bandwidth": rows}, indent=2)
