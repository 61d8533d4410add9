"""What is released: built of all that git tracks and nothing else, and what `make dist` has built runs where only it is installed."""

import os
import shutil
import subprocess
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from sae_lens_e2e import __version__, embedded
from tests.blocks import ROOT
from tests.processes import run_fresh

PACKAGE = "sae_lens_e2e"
RELEASED = f"{PACKAGE}-{__version__}"


def tracked() -> list[str]:
    """The package's files, by what git knows of them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what would be released is not known")
    found = subprocess.run(["git", "ls-files", PACKAGE], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in found.stdout.split() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built of a copy of what is tracked."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in [*tracked(), "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    done = run_fresh("-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", *options, str(folder / "source"))
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def names_in(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    assert names_in(wheel) == set(tracked())
    assert {f"{PACKAGE}/embedded/{name}" for name in ("model.safetensors", "train.parquet")} <= names_in(wheel)
    assert os.path.getsize(str(wheel.filename)) < 4 * 2**20


def test_the_wheel_is_of_the_one_version_that_the_package_says(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name == f"{RELEASED}-py3-none-any.whl"
    metadata = message_from_bytes(wheel.read(f"{RELEASED}.dist-info/METADATA"))
    assert metadata["Version"] == __version__
    assert f"## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def built() -> Path:
    folder = os.environ.get("SAE_LENS_E2E_DIST")
    if folder is None:
        pytest.skip("SAE_LENS_E2E_DIST names no folder with a wheel and an sdist: make dist")
    return Path(folder)


@pytest.mark.slow
def test_what_was_built_is_complete() -> None:
    with zipfile.ZipFile(built() / f"{RELEASED}-py3-none-any.whl") as made:
        assert names_in(made) == set(tracked())
    with tarfile.open(built() / f"{RELEASED}.tar.gz") as sources:
        names = {
            name.removeprefix(f"{RELEASED}/") for name in sources.getnames() if not sources.getmember(name).isdir()
        }
    assert set(tracked()) <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/", "examples/"))]


@pytest.mark.slow
def test_what_was_installed_trains_and_evaluates(tmp_path: Path) -> None:
    """By its command, from a folder of its own, where pip chose every version but torch's."""
    bare = os.environ.get("SAE_LENS_E2E_BARE")
    if bare is None:
        pytest.skip("SAE_LENS_E2E_BARE names no environment in which the wheel is installed: make dist")
    command = Path(bare).absolute() / "bin" / "sae-lens-e2e"

    def run(*arguments: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert __version__ in run("--version")
    train = ["train", "--model_name", "embedded", "--dataset_path", "embedded", "--hook_name", embedded.HOOK_NAME]
    train += ["--architecture", "topk", "--k", "16", "--d_in", "64", "--d_sae", "512", "--objective", "e2e_ds"]
    train += ["--prepend_bos", "false", "--context_size", "128", "--store_batch_size_prompts", "4"]
    train += ["--train_batch_size_tokens", "512", "--training_tokens", "20480", "--lr", "7e-3"]
    run(*train, "--log_to_wandb", "false", "--output_path", "my_sae")
    assert "CE loss" in run("evaluate", "my_sae", "--max-tokens", "8192")
    assert (tmp_path / "my_sae" / "sae_weights.safetensors").exists()
