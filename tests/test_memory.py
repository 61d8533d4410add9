"""Memory that is kept from step to step: when, and that it makes no new pages."""

import json
import platform
from pathlib import Path

import pytest

from sae_lens_e2e.training.memory import largest_block
from tests.processes import run_code
from tests.training import make_runner

# How many pages the system has to give a process for each of six tensors of twice the size, one after the other.
PAGES = """
import json, resource, torch
from sae_lens_e2e.training.memory import LARGE, kept_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2 * LARGE // 4).fill_(1.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (2 * LARGE)

found = {"before": [new_pages() for _ in range(6)]}
with kept_memory(LARGE):
    found["not so large"] = [new_pages() for _ in range(6)]
with kept_memory(LARGE + 1), kept_memory(LARGE + 1):
    found["kept"] = [new_pages() for _ in range(6)]
found["after"] = [new_pages() for _ in range(6)]
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is the GNU C library's malloc that gives memory back")
def test_what_is_freed_serves_the_next_and_is_given_back_at_the_end(tmp_path: Path) -> None:
    done = run_code(PAGES, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # The first, and another if something small has come to lie in its place.
    assert sum(found["kept"]) < 3
    for others in (found["before"], found["not so large"]):
        assert others == pytest.approx([1] * 6, abs=0.05)
    # It was given back; the place may serve again.
    assert found["after"][0] == pytest.approx(1, abs=0.05)


def test_the_largest_block_is_a_weight_or_the_features_of_a_pass() -> None:
    group = make_runner().make_trainer().group
    assert largest_block([group], n_tokens=1) == 4 * 40 * 16
    assert largest_block([group], n_tokens=100) == 4 * 40 * 100
