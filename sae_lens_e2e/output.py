"""Folders to write to: refused early if they cannot be written, or are somebody else's, and written whole."""

import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME

PARTIAL = ".partial-"
"""How the names begin of folders in which something is being written; the machine and the process that does come next."""


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
    with _partial(folder) as partial:
        yield partial
        for written in list(partial.iterdir()):
            os.replace(written, folder / written.name)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, under another name and move it into place; its folder is made if it is not there."""
    file = Path(path)
    with written_whole(file.parent) as partial:
        (partial / file.name).write_text(text, encoding="utf-8")


@contextmanager
def replaced_whole(path: str | Path) -> Iterator[Path]:
    """A new folder of the name of `path`, elsewhere, which takes its place with all that is in it when writing ends.

    If writing fails, `path` stays as it was.
    """
    folder = Path(path)
    with _partial(folder.parent) as partial:
        new, old = partial / folder.name, partial / f"{folder.name}.old"
        new.mkdir()
        yield new
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise


def clean_partials(path: str | Path) -> None:
    """Remove what writers of ours left half-written in a folder when they were killed.

    What a process of this machine that still runs has written stays, and so does what was written from another machine, of
    whose processes nothing is known here.
    """
    for partial in Path(path).glob(f"{PARTIAL}*"):
        host, _, process = partial.name.removeprefix(PARTIAL).rpartition("-")[0].rpartition("-")
        if host == platform.node() and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, gone afterwards; `folder` is made, and is gone too if what is done with it fails."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    partial = folder / f"{PARTIAL}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean_partials(folder)
        try:
            # Not one of tempfile's, which nobody else may read: what is made in it is to be as any other file.
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _is_running(process: int) -> bool:
    if os.name == "nt":
        # There the signal 0 is no question but Ctrl-C.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # It is there, and somebody else's.
        return True
    return True


def _is_ours(folder: Path) -> bool:
    try:
        return "objective" in json.loads((folder / RUNNER_CFG_FILENAME).read_text())
    except (OSError, ValueError):
        return False
