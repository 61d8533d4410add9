"""Folders to write to: refused early if they cannot be written, or are somebody else's, and written whole."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def check_free(path: str | Path, overwrite: bool = False) -> None:
    """Check that a folder may be written to: it is new, empty, or to be overwritten.

    Raises FileExistsError for anything else that exists, OSError if it cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not overwrite and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"output {str(path)!r} exists; choose another, or overwrite it (overwrite=True, or --overwrite)"
        )
    check_writable(folder)


def claim_output(path: str | Path, overwrite: bool = False, made_by: str | None = None) -> None:
    """`check_free`, but for a folder that an earlier run of ours wrote, which may be written to again.

    What tells an earlier run is its runner_cfg.json, or a file named `made_by`.
    """
    folder = Path(path)
    ours = _is_ours(folder) if made_by is None else (folder / made_by).is_file()
    try:
        check_free(folder, overwrite or ours)
    except FileExistsError:
        raise FileExistsError(
            f"output {str(path)!r} exists and is not one of our runs; choose another, or pass --overwrite"
        ) from None


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A folder to write files to, each of which is moved into `path` when all are there; none is if writing fails."""
    folder = Path(path)
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            yield Path(partial)
            for written in Path(partial).iterdir():
                os.replace(written, folder / written.name)
    except BaseException:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


def _is_ours(folder: Path) -> bool:
    try:
        return "objective" in json.loads((folder / RUNNER_CFG_FILENAME).read_text())
    except (OSError, ValueError):
        return False
