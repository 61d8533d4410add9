"""The README is one page, its snippet gives a stock SAE, and the wheel runs it from elsewhere. That its blocks run, `test_docs` says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.blocks import ROOT, blocks_of
from tests.processes import run_code, run_fresh, run_stock

README = ROOT / "README.md"
SNIPPETS = [block.short for block in blocks_of(README) if block.language == "python"]


def run_in_fresh(code: str, cwd: Path, **environment: str) -> str:
    done = run_fresh("-c", code, cwd=cwd, HF_HUB_OFFLINE="1", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_one_page_with_one_snippet_one_picture_and_one_table_of_results() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 150
    assert len(SNIPPETS) == 1
    assert len(re.findall(r"!\[", text)) == 1
    assert "| `warm_e2e_ds`" in text


def test_the_snippet_trains_and_saves_a_stock_sae(tmp_path: Path) -> None:
    done = run_code(SNIPPETS[0], tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = "import sys; sys.modules['sae_lens_e2e'] = None; from sae_lens import SAE; print(SAE.load_from_disk('my_sae').cfg.d_sae)"
    done = run_stock(loaded, cwd=tmp_path)
    assert done.stdout.split()[-1:] == ["1024"], done.stderr
    assert json.loads((tmp_path / "my_sae" / "cfg.json").read_text())["metadata"]["objective"]["name"] == "warm_e2e_ds"


def test_the_wheel_runs_the_first_snippet_from_elsewhere(tmp_path: Path) -> None:
    """Built from a copy of the sources, put in a folder of its own, and found there rather than in this checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what would be released is not known")
    source, wheels, installed, elsewhere = (tmp_path / name for name in ("source", "wheels", "installed", "elsewhere"))
    elsewhere.mkdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file() and name.startswith(("sae_lens_e2e/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels), str(source)]
    assert run_fresh(*pip, *build).returncode == 0
    (wheel,) = wheels.glob("*.whl")
    assert wheel.stat().st_size < 4 * 2**20
    assert not run_fresh(*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)).returncode
    where = run_in_fresh(SNIPPETS[0] + "\nprint(embedded.__file__)", elsewhere, PYTHONPATH=str(installed))
    assert where.split()[-1].startswith(str(installed))
    assert (elsewhere / "my_sae" / "sae_weights.safetensors").exists()
