"""Processes that are killed, and what they leave compared with what a straight run leaves."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tests.processes import ended, redirect, start

_TIMES = ("seconds", "details/seconds", "tokens_per_second")
_PATHS = ("checkpoint_path", "output_path", "resume_from_checkpoint")


def finished(
    run: Callable[[Path], None], out: Path, killed_after: float | None = None, at_move: int | None = None
) -> bool:
    """Let a process of its own do a run; kill it after so many seconds, or at the n-th file it moves. Whether it ended well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    process = start(_do, run, out, at_move)
    if not ended(process, killed_after):
        process.kill()
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run failed instead of going on; see {out.parent / 'log'}")
    return process.exitcode == 0


def duration(run: Callable[[Path], None], out: Path) -> float:
    """How long a run takes that nobody kills."""
    started = time.monotonic()
    assert finished(run, out)
    return time.monotonic() - started


def _do(run: Callable[[Path], None], out: Path, at_move: int | None) -> None:
    redirect(out.parent / "log", out.parent / "log")
    if at_move is not None:
        _die_at_move(at_move)
    run(out)


def _die_at_move(number: int) -> None:
    """Have this process killed instead of its n-th move of a file or folder, with which our writers end."""
    moved, replace = 0, os.replace

    def replace_or_die(*arguments: Any, **keywords: Any) -> None:
        nonlocal moved
        moved += 1
        if moved == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments, **keywords)

    os.replace = replace_or_die


def content(out: Path) -> dict[str, Any]:
    """All that a run has left in its folder, by file, but for checkpoints, times and paths."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and "checkpoints" not in path.parts]
    return {str(path.relative_to(out)): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.suffix == ".csv":
        frame = pd.read_csv(path, float_precision="round_trip")
        return frame.drop(columns=[name for name in frame if str(name).endswith(_TIMES)]).to_csv()
    if path.suffix == ".json":
        return _without(json.loads(path.read_text()))
    return path.read_bytes()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(part) for key, part in value.items() if key not in (*_TIMES, *_PATHS)}
    return value
