"""One thread for each test process (grids of several ranks share few cores), and no module finds
the process groups of another.
"""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and inherited by spawned ranks

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# Modules that fork their ranks and also run models in the test process itself, whose gloo threads
# no later fork would survive.
DO_BOTH = ("construction/test_score_scale",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork their ranks come first."""

    def order(item: pytest.Item) -> int:
        if item.nodeid.removeprefix("tests/").startswith(DO_BOTH):
            return 1
        return 0 if hasattr(getattr(item, "module", None), "run_ranks") else 2

    items.sort(key=order)


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Tools leave the job of one process they made to the end of their process."""
    yield
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
