"""The benchmarks measure what they say: the sides compute the same, and the table has its rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_code, run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COLUMNS = ["shape", "objective", "step", "prompts x tokens", "s a step", "tokens/s", "peak GiB", "GiB above the model"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_of_a_device(tmp_path: Path):
    run = run_script(
        BENCHMARKS / "gpu.py",
        *("--device", "cpu", "--shape", "tiny", "--prompts", "3", "--steps", "2"),
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
    )
    assert run.returncode == 0, run.stderr
    first, _, header, _, *rows = run.stdout.splitlines()
    assert "cpu" in first
    assert cells(header) == COLUMNS
    assert [cells(row)[:4] for row in rows] == [
        ["tiny", objective, way, "3 x 64"] for objective in ("local", "e2e_ds") for way in ("ours", "naive", "whole KL")
    ]
    for row in rows:
        seconds, per_second = (float(cell.replace(",", "")) for cell in cells(row)[4:6])
        # The seconds are rounded to a thousandth.
        assert per_second == pytest.approx(3 * 64 / seconds, rel=0.0006 / seconds)


def test_without_a_cuda_device_one_line_says_so(tmp_path: Path):
    run = run_script(BENCHMARKS / "gpu.py", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 1
    assert run.stderr == "gpu.py needs a CUDA device and there is none; to try it out: --device cpu --shape tiny\n"


def test_a_peer_that_is_not_there_is_one_line(tmp_path: Path):
    nowhere = run_script(BENCHMARKS / "peers.py", "--apollo", "nowhere", cwd=tmp_path)
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert nowhere.stderr.startswith("--apollo nowhere: no e2e_sae folder is in it")
    assert nowhere.stderr.count("\n") == 1
    neither = run_script(BENCHMARKS / "peers.py", "--sparsify", "nowhere", cwd=tmp_path)
    assert neither.returncode == 1
    assert [line.split(" is left out:")[0] for line in neither.stdout.splitlines()] == ["sparsify", "Apollo's library"]


FITTING = """
import json, sys
sys.path.insert(0, {benchmarks!r})
import torch
from gpu import Case, largest_that_fits, row, same

def allocates(most):
    # More memory than there is, as soon as there are more than `most` prompts.
    return lambda n: {{"bytes": torch.empty(2**60 if n > most else 8, dtype=torch.int8).numel()}}

print(json.dumps([largest_that_fits(allocates(most), n) for most, n in ((16, 16), (4, 16), (9, 12), (0, 16))]))
print(row(Case("tiny", "local", "ours", 64, 16, 2, "cpu"), None))
ours = {{"n_prompts": 4, "first_loss": 1.0}}
print([same(ours, ours | {{"first_loss": 1.1}}), same(ours, ours), same(ours, None)])
try:
    largest_that_fits(lambda n: torch.ones(2) @ torch.ones(3), 16)
except RuntimeError as error:
    print("raised", error)
"""


def test_as_many_prompts_as_fit_memory(tmp_path: Path):
    run = run_code(FITTING.format(benchmarks=str(BENCHMARKS)), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found, row, same, raised = run.stdout.splitlines()
    assert json.loads(found) == [{"n_prompts": n, "bytes": 8} for n in (16, 4, 8)] + [None]
    assert cells(row)[:4] == ["tiny", "local", "ours", "does not fit memory"]
    assert len(cells(row)) == len(COLUMNS)
    assert same == "[False, True, True]"
    assert raised.startswith("raised")
    assert "size" in raised


PUBLISHED = {
    "gpt2-small": 124_439_808,
    "pythia-410m": 405_334_016,
    "gemma-2-2b": 2_614_341_888,
    "llama-3.2-1b": 1_235_814_400,
}
SIZES = """
import json, sys
sys.path.insert(0, {benchmarks!r})
from gpu import SHAPES
from random_models import RANDOM_MODELS

found = {{}}
for name in SHAPES:
    model = RANDOM_MODELS[name].load("meta")
    blocks = [model.get_submodule(RANDOM_MODELS[name].hook_name(i + 1)) for i in range(model.config.num_hidden_layers)]
    found[name] = [sum(p.numel() for p in model.parameters()), len(set(blocks))]
print(json.dumps(found))
"""


def test_the_models_are_as_large_as_those_they_stand_for(tmp_path: Path):
    run = run_code(SIZES.format(benchmarks=str(BENCHMARKS)), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert {name: size for name, (size, _) in found.items()} == PUBLISHED
    assert [n_blocks for _, n_blocks in found.values()] == [12, 24, 26, 16]


BOTH_SIDES = """
import json, sys
sys.path.insert(0, {benchmarks!r})
from dataclasses import asdict
from measure import Case, measure

objectives = ("local", "e2e", "e2e_ds")
print(json.dumps([measure(Case("tiny", of, side, steps=1)) for of in objectives for side in ("naive", "ours")]))
"""


def test_the_naive_step_and_ours_have_the_same_loss(tmp_path: Path):
    run = run_code(BOTH_SIDES.format(benchmarks=str(BENCHMARKS)), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    for naive, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (naive["side"], ours["side"]) == ("naive", "ours")
        assert ours["first_loss"] == pytest.approx(naive["first_loss"], rel=1e-5)
        assert ours["first_loss"] > 0
