"""Folders to write to: refused early if they cannot be written, or are somebody else's."""

import json
import tempfile
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME


def check_writable(path: str | Path) -> None:
    """Raises OSError, naming the folder, if it could not be made or written in. Leaves nothing behind."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"cannot write to output folder {str(path)!r}: {error.strerror or error}") from error


def claim_output(path: str | Path, overwrite: bool = False, made_by: str | None = None) -> None:
    """Check that a folder may be written to: it is new, empty, from an earlier run of ours, or to be overwritten.

    What tells an earlier run is its runner_cfg.json, or a file named `made_by`. Raises FileExistsError for anything else that
    exists, OSError if it cannot be written.
    """
    folder = Path(path)
    ours = _is_ours(folder) if made_by is None else (folder / made_by).is_file()
    if folder.exists() and not overwrite and not _is_free(folder) and not ours:
        raise FileExistsError(
            f"output {str(path)!r} exists and is not one of our runs; choose another, or pass --overwrite"
        )
    check_writable(folder)


def _is_free(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _is_ours(folder: Path) -> bool:
    try:
        return "objective" in json.loads((folder / RUNNER_CFG_FILENAME).read_text())
    except (OSError, ValueError):
        return False
