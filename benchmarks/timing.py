"""What every measurement has in common: the median step, synchronised, and the peak memory above what was there before.

Needs PyTorch alone, so that the environment of another library can use it too.
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 2
"""Steps before the timed ones."""


class Peak(Protocol):
    """Memory, in GiB, while it is entered: the most, and what there was before."""

    before: float
    peak: float

    def __enter__(self) -> "Peak": ...

    def __exit__(self, *_: object) -> None: ...


def peak_memory(device: str) -> Peak:
    """What watches a device: what PyTorch has allocated there on CUDA, the process's resident memory elsewhere."""
    return AllocatedMemory(device) if device.startswith("cuda") else ResidentMemory()


def resident_gib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


class ResidentMemory:
    """The most resident memory seen while it is entered, sampled every two milliseconds."""

    def __enter__(self) -> "ResidentMemory":
        self.before = self.peak = resident_gib()
        self.running = True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident_gib())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


class AllocatedMemory:
    """The most that PyTorch's CUDA allocator has given out on a device while it is entered."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> "AllocatedMemory":
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = self.peak = torch.cuda.memory_allocated(self.device) / 2**30
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) / 2**30


def figures(seconds: Sequence[float], memory: Peak) -> dict[str, float]:
    """The median of the seconds after those for warming up, and the peak: in all, and above what was there before."""
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak_gib": memory.peak - memory.before,
        "peak_in_all_gib": memory.peak,
    }


def measured_steps(
    make_step: Callable[[], Callable[[Tensor], float]], batches: Sequence[Tensor], device: str = "cpu"
) -> dict[str, Any]:
    """`figures` of a step that is made and then run on each batch, and its first loss. Nothing is pending when a step's time is taken."""
    seconds, losses = [], []
    with peak_memory(device) as memory:
        step = make_step()
        for batch in batches:
            synchronize(device)
            start = time.perf_counter()
            losses.append(step(batch))
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return {**figures(seconds, memory), "first_loss": losses[0]}


def synchronize(device: str) -> None:
    """Wait for all that a device has been told to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def random_batches(n_steps: int, n_prompts: int, n_pos: int, d_vocab: int, device: str = "cpu") -> list[Tensor]:
    """Random tokens for the steps that warm up and those that are timed; the same in each process."""
    generator = torch.Generator().manual_seed(1)
    sizes = (n_prompts, n_pos)
    return [torch.randint(0, d_vocab, sizes, generator=generator).to(device) for _ in range(WARM_UP + n_steps)]
