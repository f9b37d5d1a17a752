"""One thread for each test process: grids of several ranks share few cores."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and inherited by spawned ranks

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def leave_no_process_groups() -> Iterator[None]:
    """A test that runs a model in this process must not hand its grid to ranks forked later."""
    yield
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
