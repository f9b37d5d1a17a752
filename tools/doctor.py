"""Is this machine fit for a training, and what would make it faster?

    python tools/doctor.py --folder RUNS                          # this node
    torchrun --nproc-per-node 8 tools/doctor.py --folder RUNS     # and its collectives

Checks what is installed against the versions that were tested, what the missing packages cost,
GPUs, cores, shared memory, limits, and the folder where checkpoints go. Started with torchrun, on
one node or many, it measures the bandwidth of the collectives too.

Exit code: 0 fine; 1 something makes a run slower or smaller; 2 a run cannot work. (torchrun turns
both into 1.)
"""

from __future__ import annotations

from megatron_ext.errors import UserError, run_main


def main() -> int:
    import os
    from dataclasses import dataclass

    try:
        import tyro

        from megatron_ext.doctor import finding
        from megatron_ext.doctor.examination import Needs, examine, examine_together
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", "pip install -e .") from None

    @dataclass
    class Doctor(Needs):
        json: bool = False
        """Print JSON."""
        verdict: bool = False
        """Print only a line for each node: `fit: NODE`, or `limited:` or `unfit:` with reasons."""

    options = tyro.cli(Doctor, description=__doc__)
    if "RANK" in os.environ:
        reports, rows = examine_together(options)
        if int(os.environ["RANK"]):
            return 0
    else:
        reports, rows = [examine(options)], []
    if options.json:
        print(finding.as_json(reports, rows))
    else:
        for report in reports:
            if not options.verdict:
                print(f"{report.host}:", *report.findings, sep="\n")
            print(report.verdict())
        for row in rows:
            print(row)
    return max(report.severity for report in reports)


if __name__ == "__main__":
    run_main(main)
