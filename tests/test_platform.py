"""What the CPU mapping must leave as it was."""

import subprocess
import sys

PROGRAM = """
import torch
from megatron_ext import platform
platform.setup("cpu")
with torch.device("meta"):
    made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.arange(2), torch.randn(2)]
print({str(tensor.device) for tensor in made})
"""


def test_the_default_device_still_counts() -> None:
    """In a process of its own: torch remembers its factories from their first use."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "{'meta'}"
