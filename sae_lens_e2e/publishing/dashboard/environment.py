"""The Python environment that SAEDashboard runs in: one of its own, because its pins exclude ours."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from sae_lens import logger

from sae_lens_e2e.output import written_whole

VERSION = "0.8.0"
"""Of SAEDashboard (PyPI `sae-dashboard`): the one that our driver is written for."""
REQUIREMENTS = Path(__file__).with_name("requirements.txt")

_ASK_VERSION = "import importlib.metadata; print(importlib.metadata.version('sae-dashboard'))"


def checked_python(python: str | Path) -> Path:
    """The path of an interpreter whose environment has SAEDashboard. Raises ValueError, saying how to install it, if it has not."""
    found = shutil.which(python)
    if found is None:
        raise ValueError(
            f"python={str(python)!r} is no program; give the interpreter of an environment, or leave python out"
        )
    asked = subprocess.run([found, "-I", "-c", _ASK_VERSION], capture_output=True, text=True)
    if asked.returncode != 0:
        raise ValueError(
            f"python={str(python)!r} has no sae-dashboard; run `{python} -m pip install -r {REQUIREMENTS}` and "
            f"`{python} -m pip install --no-deps sae-dashboard=={VERSION}`, or leave python out"
        )
    if asked.stdout.strip() != VERSION:
        logger.warning(f"python={str(python)!r} has sae-dashboard {asked.stdout.strip()}; {VERSION} is known to work")
    # Not resolved: an environment's interpreter is a link to another's.
    return Path(found).absolute()


def own_python() -> Path:
    """The interpreter of an environment with SAEDashboard in the user's cache folder, which is made if it is not there.

    pip makes it as it is configured: for torch without CUDA, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
    Raises ChildProcessError if it cannot; nothing half-made is left.
    """
    home = own_environment()
    if not _interpreter(home).exists():
        logger.warning(f"making an environment for SAEDashboard in {home}, once: some minutes, and 2 GB without CUDA")
        _make(home)
    return _interpreter(home)


def own_environment() -> Path:
    """Where `own_python` makes its environment: a folder for each version, interpreter and list of requirements."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:8]
    major, minor = sys.version_info[:2]
    return cache / "sae-lens-e2e" / f"dashboard-{VERSION}-python{major}.{minor}-{digest}"


def _make(home: Path) -> None:
    try:
        # Only the programs beside the interpreter know where it was made, and they are not used.
        with written_whole(home.parent) as partial:
            venv.create(partial / home.name, symlinks=os.name != "nt", with_pip=True)
            python = _interpreter(partial / home.name)
            _pip_install(python, "-r", str(REQUIREMENTS))
            _pip_install(python, "--no-deps", f"sae-dashboard=={VERSION}")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or b"").decode(errors="replace").strip().splitlines()
        raise ChildProcessError(
            f"cannot make an environment for SAEDashboard: {said[-1] if said else error}; make one yourself with `pip "
            f"install -r {REQUIREMENTS}` and `pip install --no-deps sae-dashboard=={VERSION}`, and pass its python"
        ) from error
    except OSError:
        # Somebody else was making it too, and was first.
        if not _interpreter(home).exists():
            raise


def _pip_install(python: Path, *arguments: str) -> None:
    command = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def _interpreter(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
