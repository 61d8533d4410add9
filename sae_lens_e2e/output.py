"""Folders to write to: refused early if they cannot be written, or are somebody else's, and written whole."""

import errno
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sae_lens import logger
from sae_lens.constants import RUNNER_CFG_FILENAME
from safetensors import SafetensorError

from sae_lens_e2e.errors import named_line
from sae_lens_e2e.yaml_file import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PARTIAL = ".partial-"
"""How the names begin of folders in which something is being written; the machine and the process that does come next."""
LOCK = ".lock"
"""A file that the process at work in a folder holds; one that is left, and that none holds, is of a killed one."""

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)
# Of safetensors and of torch, which have no error of their own for it.
_UNWRITTEN = ("I/O error", "inline_container", "PytorchStreamWriter")


def check_writable(path: str | Path, kind: str = "output") -> None:
    """Raises OSError, naming the folder and its kind, if it could not be made or written in. Leaves nothing behind."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {kind} folder {str(path)!r}: {error.strerror or error}") from error


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

    What tells an earlier run is its runner_cfg.json, or a file named `made_by`; what tells a killed one, that there is nothing
    but what it left: its lock, half-written files, checkpoints.
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
        # What says that all is there comes last.
        for written in sorted(partial.iterdir(), key=lambda file: (file.name == RUNNER_CFG_FILENAME, file.name)):
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


@contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Have a folder, which is made if need be, to oneself; says whether a process that was killed had it before.

    Raises BlockingIOError, naming the process, if another is at work in it. Where the system has no such locks it has none.
    """
    folder = Path(path)
    with _made(folder), _locked_file(folder / LOCK) as (file, was_left):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield was_left


@contextmanager
def _locked_file(path: Path) -> Iterator[tuple[IO[str], bool]]:
    """A file that this process holds, and whether it was there before; it is gone afterwards."""
    while True:
        was_left = path.exists()
        file = path.open("a+")
        try:
            _hold(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(
                f"{holder} is at work in {str(path.parent)!r}; wait for it, or choose another output folder"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        # Whoever held it has just ended, and removed it.
        file.close()
    try:
        yield file, was_left
    finally:
        # In this order, lest it be somebody else's by now; Windows removes no file that is open.
        if os.name == "nt":
            file.close()
        path.unlink(missing_ok=True)
        file.close()


def _hold(file: IO[str]) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning(f"{file.name} cannot be locked ({error.strerror}): see that no other run writes there")


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
    partial = folder / f"{PARTIAL}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    with _made(folder):
        clean_partials(folder)
        try:
            # Not one of tempfile's, which nobody else may read: what is made in it is to be as any other file.
            partial.mkdir()
            yield partial
        except Exception as error:
            if _is_no_room(error):
                raise OSError(
                    f"cannot write to {str(folder)!r} ({named_line(error)}); see whether the disk is full, or a file may not be so large"
                ) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder if it is not there, and if what is done with it fails, take it away again where it is empty."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _is_no_room(error: Exception) -> bool:
    """Whether an error is one of those by which the system, safetensors and torch say that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return isinstance(error, SafetensorError | RuntimeError) and any(words in str(error) for words in _UNWRITTEN)


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
    return _is_record(folder / RUNNER_CFG_FILENAME) or (folder / LOCK).is_file() or _is_left(folder)


def _is_record(file: Path) -> bool:
    try:
        return "objective" in read_json(file)
    except (OSError, ValueError):
        return False


def _is_left(folder: Path) -> bool:
    """Whether a killed run has left all that is in a folder: what it was writing, and checkpoints, in folders of any names."""
    if not folder.is_dir():
        return False
    others = [path for path in folder.iterdir() if not path.name.startswith(PARTIAL)]
    return all(path.is_dir() and (_is_record(path / RUNNER_CFG_FILENAME) or _is_left(path)) for path in others)
