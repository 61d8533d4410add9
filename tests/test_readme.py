"""Every Python snippet of the README runs, its diff is one that applies, and the wheel runs the first from elsewhere."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import run_code, run_fresh, run_stock

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
TOKENS = re.compile(r"training_tokens=[\d_]+")


def shortened(snippet: str) -> str:
    """The snippet with four optimizer steps' worth of training."""
    return TOKENS.sub(f"training_tokens={4 * 4 * 256}", snippet)


def run(code: str, cwd: Path) -> str:
    done = run_code(code, cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_in_fresh(code: str, cwd: Path, **environment: str) -> str:
    done = run_fresh("-c", code, cwd=cwd, HF_HUB_OFFLINE="1", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_the_snippets_that_are_run() -> None:
    assert len(SNIPPETS) == 3
    assert TOKENS.search(SNIPPETS[0])


def test_the_first_snippet_trains_and_saves_a_stock_sae(tmp_path: Path) -> None:
    run(shortened(SNIPPETS[0]), tmp_path)
    loaded = "import sys; sys.modules['sae_lens_e2e'] = None; from sae_lens import SAE; print(SAE.load_from_disk('my_sae').cfg.d_sae)"
    done = run_stock(loaded, cwd=tmp_path)
    assert done.stdout.split()[-1:] == ["1024"], done.stderr
    assert json.loads((tmp_path / "my_sae" / "cfg.json").read_text())["metadata"]["objective"]["name"] == "warm_e2e_ds"


def test_the_second_snippet_trains_several_and_saves_each(tmp_path: Path) -> None:
    run(shortened(SNIPPETS[1]), tmp_path)
    for name in ("early", "late"):
        metadata = json.loads((tmp_path / "my_saes" / name / "cfg.json").read_text())["metadata"]
        assert metadata["objective"]["name"] == "e2e"
        assert set(metadata["companions"]) == {"early", "late"} - {name}


def test_the_plugin_snippet_trains(tmp_path: Path) -> None:
    (tmp_path / "rare.py").write_text(SNIPPETS[2])
    register = "import rare; from sae_lens_e2e.objectives.plugins import plugin_manager; plugin_manager().register(rare, name='rare')\n"
    code = shortened(SNIPPETS[0]).replace('objective="warm_e2e_ds"', 'objective="rare_kl"')
    run(register + code + "\nprint(cfg.objective)", tmp_path)


def test_the_diff_from_sae_lens_makes_a_config() -> None:
    diff = re.search(r"^```diff\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert diff is not None
    after = "\n".join(line[1:] for line in diff[1].splitlines() if not line.startswith("-"))
    namespace: dict[str, object] = {}
    exec("from sae_lens import StandardTrainingSAEConfig\n" + after.split("sae = E2ETrainingRunner")[0], namespace)
    assert type(namespace["cfg"]).__name__ == "E2ERunnerConfig"


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
    where = run_in_fresh(shortened(SNIPPETS[0]) + "\nprint(embedded.__file__)", elsewhere, PYTHONPATH=str(installed))
    assert where.split()[-1].startswith(str(installed))
    assert (elsewhere / "my_sae" / "sae_weights.safetensors").exists()
