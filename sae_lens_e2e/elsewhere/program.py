"""A program that runs in a Python environment of its own, because its pins exclude ours: how that is made, and how it is run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import logger

from sae_lens_e2e.elsewhere import host
from sae_lens_e2e.output import written_whole

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Program:
    """One such program, and the folder with our `driver.py` for it and the `requirements.txt` that it runs with."""

    name: str
    package: str
    """On the package index. It is installed without its dependencies, which are the requirements."""
    version: str
    """The one that our driver is written for."""
    folder: Path

    @property
    def requirements(self) -> Path:
        """What it runs with."""
        return self.folder / "requirements.txt"

    def checked_python(self, python: str | Path) -> Path:
        """The path of an interpreter whose environment has the program. Raises ValueError, saying how to install it, if it has not."""
        found = shutil.which(python)
        if found is None:
            raise ValueError(
                f"python={str(python)!r} is no program; give the interpreter of an environment, or leave python out"
            )
        ask_version = f"import importlib.metadata; print(importlib.metadata.version({self.package!r}))"
        asked = subprocess.run([found, "-I", "-c", ask_version], capture_output=True, text=True)
        if asked.returncode != 0:
            raise ValueError(
                f"python={str(python)!r} has no {self.package}; run `{python} -m pip install -r {self.requirements}` and "
                f"`{python} -m pip install --no-deps {self.package}=={self.version}`, or leave python out"
            )
        if asked.stdout.strip() != self.version:
            logger.warning(
                f"python={str(python)!r} has {self.package} {asked.stdout.strip()}; {self.version} is known to work"
            )
        # Not resolved: an environment's interpreter is a link to another's.
        return Path(found).absolute()

    def own_python(self) -> Path:
        """The interpreter of an environment with the program in the user's cache folder, which is made if it is not there.

        pip makes it as it is configured: for torch without CUDA, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
        Raises ChildProcessError if it cannot; nothing half-made is left.
        """
        home = self.own_environment()
        if not _interpreter(home).exists():
            logger.warning(
                f"making an environment for {self.name} in {home}, once: some minutes, and 2 GB without CUDA"
            )
            self._make(home)
        return _interpreter(home)

    def own_environment(self) -> Path:
        """Where `own_python` makes its environment: a folder for each version, interpreter and list of requirements."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(self.requirements.read_bytes()).hexdigest()[:8]
        major, minor = sys.version_info[:2]
        return cache / "sae-lens-e2e" / f"{self.name.lower()}-{self.version}-python{major}.{minor}-{digest}"

    def run(self, job: dict[str, Any], working: Path, python: Path, verbose: bool = True) -> None:
        """Have an interpreter do a job in a folder, as our driver does it there. Raises ChildProcessError with what it says if it fails.

        With `host.TOKENS` in the folder, nothing is asked of the network.
        """
        (working / host.JOB).write_text(json.dumps(job))
        offline = _OFFLINE if (working / host.TOKENS).exists() else {}
        done = subprocess.run(
            # Isolated, because a script's own folder is searched for imports otherwise, and so is PYTHONPATH.
            [python, "-I", "-W", "ignore", host.__file__, self.folder / "driver.py"],
            cwd=working,
            env=os.environ | offline,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if verbose else subprocess.DEVNULL,
        )
        if done.returncode != 0:
            error = working / host.ERROR
            said = error.read_text().strip() if error.exists() else f"it ended with exit status {done.returncode}"
            raise ChildProcessError(f"{self.name} failed: {' '.join(said.split())}")

    def _make(self, home: Path) -> None:
        try:
            # Only the programs beside the interpreter know where it was made, and they are not used.
            with written_whole(home.parent) as partial:
                venv.create(partial / home.name, symlinks=os.name != "nt", with_pip=True)
                python = _interpreter(partial / home.name)
                _pip_install(python, "-r", str(self.requirements))
                _pip_install(python, "--no-deps", f"{self.package}=={self.version}")
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout or b"").decode(errors="replace").strip().splitlines()
            raise ChildProcessError(
                f"cannot make an environment for {self.name}: {said[-1] if said else error}; make one yourself with `pip "
                f"install -r {self.requirements}` and `pip install --no-deps {self.package}=={self.version}`, and pass its python"
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
