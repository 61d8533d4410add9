"""A command of ours in a process of its own, to which something happens on the way."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sae_lens_e2e import cli
from sae_lens_e2e.training.prompts import PromptBatches
from tests import processes

Happening = Callable[[Path], None]


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    said: list[str]
    """The lines that it wrote."""

    @property
    def last(self) -> str:
        """The last line, which says what went wrong."""
        return self.said[-1] if self.said else ""


class Running:
    """A command in a process of its own; `happening` is called in it, with its folder, before the n-th prompts of a run."""

    def __init__(self, folder: Path, *arguments: str, happening: Happening | None = None, at: int = 1):
        self._log = folder / f"log-{time.monotonic_ns()}"
        self._process = processes.start(_do, folder, self._log, arguments, happening, at)

    def end(self) -> Ended:
        """Wait for its end."""
        processes.ended(self._process)
        assert self._process.exitcode is not None
        return Ended(self._process.exitcode, self._log.read_text().splitlines())


def ended(folder: Path, *arguments: str, happening: Happening | None = None, at: int = 1) -> Ended:
    """How a command ended that was run as `Running` does."""
    return Running(folder, *arguments, happening=happening, at=at).end()


def waiting_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so. Raises AssertionError if that takes too long."""
    give_up = time.monotonic() + processes.LIMIT / 2
    while not condition():
        assert time.monotonic() < give_up, "it has not come to that"
        time.sleep(0.02)


def _do(folder: Path, log: Path, arguments: tuple[str, ...], happening: Happening | None, at: int) -> None:
    processes.redirect(log, log)
    if happening is not None:
        _have_happen(lambda: happening(folder), at)
    raise SystemExit(cli.main(arguments))


def _have_happen(action: Callable[[], None], at: int) -> None:
    ask, asked = PromptBatches.__next__, 0

    def act_then_ask(self: PromptBatches) -> Tensor:
        nonlocal asked
        asked += 1
        if asked == at:
            action()
        return ask(self)

    PromptBatches.__next__ = act_then_ask
