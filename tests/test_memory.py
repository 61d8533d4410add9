"""Memory that is kept from step to step: when, and that it makes no new pages."""

import platform
import resource

import pytest
import torch

from sae_lens_e2e.training.memory import LARGE, kept_memory, largest_block
from tests.training import make_runner

N_FLOATS = 2 * LARGE // 4


def new_pages() -> int:
    """How many pages of memory the system has to give this process for two tensors, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        torch.empty(N_FLOATS).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is the GNU C library's malloc that gives memory back")
def test_what_is_freed_serves_the_next_and_is_given_back_at_the_end() -> None:
    both = 2 * N_FLOATS * 4 // resource.getpagesize()
    assert new_pages() > 0.9 * both
    with kept_memory(LARGE):
        assert new_pages() > 0.9 * both, "nothing here is larger than what is kept in any case"
    with kept_memory(LARGE + 1), kept_memory(LARGE + 1):
        new_pages()
        assert new_pages() < 0.1 * both
    assert new_pages() > 0.9 * both


def test_the_largest_block_is_a_weight_or_the_features_of_a_pass() -> None:
    group = make_runner().make_trainer().group
    assert largest_block([group], n_tokens=1) == 4 * 40 * 16
    assert largest_block([group], n_tokens=100) == 4 * 40 * 100
