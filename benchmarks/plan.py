"""Time and memory of planning a 7B recipe on 10,240 ranks, by tools/plan.py from start to end.

    python benchmarks/plan.py

There is no peer that builds the model it plans; the bars are those that were set for this tool.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from report import row, write

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "recipes" / "llama2_7b_2of8_128nodes.yaml"
GRIDS = {
    "tensor 2": ["--tensor-model-parallel-size", "2", "--global-batch-size", "5120"],
    "tensor 4, pipeline 4": [
        *("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"),
        *("--global-batch-size", "3840"),
    ],
}


def main() -> None:
    rows = []
    for name, options in GRIDS.items():
        command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config", str(RECIPE)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [*command, "--world-size", "10240", *options],
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        what = f"plan of LLaMA-2-7B 2/8 on 10,240 ranks, {name}"
        rows += [
            row(f"{what}: CPU time", "s", cpu, bar=60.0, higher_is_better=False),
            row(f"{what}: wall time", "s", wall, bar=60.0, higher_is_better=False),
            row(
                f"{what}: peak memory (largest of the runs so far)",
                "GiB",
                after.ru_maxrss / 2**20,
                bar=4.0,
                higher_is_better=False,
            ),
        ]
    write("plan", rows)


if __name__ == "__main__":
    main()
