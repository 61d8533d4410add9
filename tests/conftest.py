"""What every test runs under: as many threads as the models here are worth."""

import gc
import os
import shlex
import sys
from pathlib import Path

# Before torch is imported. The models are so small that a second thread costs more than it brings, and a process that a
# test starts would otherwise take as many threads as the machine has cores beside ours.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.fork_server import OURS, STOCK


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than the cores that this process may use, as a test in eight waits for another process; four at most, of 2 GB each."""
    return min((len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1, 4)


def pytest_configure(config: pytest.Config) -> None:
    # Nothing that is imported is garbage: looking through it again and again takes a tenth of the time.
    gc.disable()
    if config.getoption("tx", None) and not hasattr(config, "workerinput"):
        # For all workers, while they collect.
        STOCK.share()
        OURS.share()
        program = shlex.join([sys.executable, str(Path(__file__).with_name("worker.py"))])
        config.option.tx = [f"popen//python={program}" if one == "popen" else one for one in config.option.tx]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
