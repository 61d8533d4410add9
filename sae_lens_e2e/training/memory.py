"""Memory that one step frees, kept for the next.

The GNU C library gives a block of more than 32 MiB back to the system when it is freed, and gets the next one anew, page by page: writing to
a new tensor of 140 MB takes four times as long as writing to one that was there. A step of a large dictionary makes a dozen of them.
"""

import ctypes
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_e2e.training.group import Group

LARGE = 32 * 2**20
"""Bytes. What is smaller is kept in any case, once blocks of its size have been freed."""

# Of malloc.h: the most blocks that are mapped by themselves, how much is kept free, and what both are by default.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
_MAPPED, _TRIMMED = 65536, 128 * 1024

_entered = 0


def largest_block(groups: "Iterable[Group]", n_tokens: int) -> int:
    """Bytes of the largest tensor that a forward pass of `n_tokens` makes of an SAE on a CPU: the gradient of a weight, or its features."""
    sizes = [0]
    for sae in (trainer.sae for group in groups for trainer in group.trainers.values()):
        weights = [weight for weight in sae.parameters() if weight.device.type == "cpu"]
        sizes += [weight.nbytes for weight in weights]
        sizes += [n_tokens * sae.cfg.d_sae * weight.element_size() for weight in weights]
    return max(sizes)


@contextmanager
def kept_memory(largest: int) -> Iterator[None]:
    """While it is entered, by whomever, this process keeps the memory that it frees, if its `largest` block, in bytes, is one that it would not.

    Afterwards the memory is given back. With the GNU C library's own malloc; with another nothing changes.
    """
    global _entered
    library = _gnu_c_library() if largest > LARGE else None
    if library is None:
        yield
        return
    if not _entered:
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
    _entered += 1
    try:
        yield
    finally:
        _entered -= 1
        if not _entered:
            library.mallopt(_M_MMAP_MAX, _MAPPED)
            library.mallopt(_M_TRIM_THRESHOLD, _TRIMMED)
            library.malloc_trim(0)


@cache
def _gnu_c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
