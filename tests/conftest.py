"""One thread for each test process: grids of several ranks share few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and inherited by spawned ranks

import torch  # noqa: E402

torch.set_num_threads(1)
