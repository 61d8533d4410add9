"""Ranks as torchrun starts them: processes that know each other by the environment, copies of one that has imported everything."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests import processes


class Ended(NamedTuple):
    """How a rank ended."""

    code: int | None
    said: str
    """What it wrote to standard error and output."""
    gave: Any
    """What its function gave, as JSON has it."""


def in_ranks(folder: Path, target: Callable[..., Any], *arguments: Any, n: int = 2) -> list[Ended]:
    """How `n` ranks ended that called `target` each; when one ends badly the others are told to, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = [processes.start(_as_rank, folder, number, n, port, target, arguments) for number in range(n)]
    give_up = time.monotonic() + processes.LIMIT / 2
    while any(process.is_alive() for process in started) and time.monotonic() < give_up:
        if any(process.exitcode not in (None, 0) for process in started):
            _tell_to_end(started)
            break
        time.sleep(0.02)
    return [_ended(process, folder, number) for number, process in enumerate(started)]


def _tell_to_end(started: list[BaseProcess]) -> None:
    # A moment later than that, for those who are ending anyway.
    time.sleep(0.1)
    for process in started:
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)


def _ended(process: BaseProcess, folder: Path, number: int) -> Ended:
    processes.ended(process)
    gave = folder / f"gave-{number}.json"
    return Ended(
        process.exitcode, _said(folder, number).read_text(), json.loads(gave.read_text()) if gave.is_file() else None
    )


def _said(folder: Path, number: int) -> Path:
    return folder / f"said-{number}"


def _as_rank(
    folder: Path, number: int, n: int, port: int, target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    processes.redirect(_said(folder, number), _said(folder, number))
    os.environ |= {
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    gave = target(*arguments)
    (folder / f"gave-{number}.json").write_text(json.dumps(gave))
