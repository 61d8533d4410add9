"""What every test runs under: as many threads as the models here are worth."""

import os

# Before torch is imported. The models are so small that a second thread costs more than it brings, and a process that a
# test starts would otherwise take as many threads as the machine has cores beside ours.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process a core that this one may use, four at most: each takes up to 2 GB."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)
