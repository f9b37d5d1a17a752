"""One thread for each test process: grids of several ranks share few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and inherited by spawned ranks

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# These run models in the test process itself, whose gloo threads no later fork would survive.
IN_THIS_PROCESS = ("checkpoint/test_hf", "checkpoint/test_weights", "tools/", "test_pretrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork their ranks come first."""
    items.sort(key=lambda item: item.nodeid.removeprefix("tests/").startswith(IN_THIS_PROCESS))
