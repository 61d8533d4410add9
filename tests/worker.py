"""The program of a test worker: what `python` would be asked to do, done by a copy of a process that has imported everything.

pytest-xdist starts `python tests/worker.py -u -c CODE`; this one hands its streams and environment on, and waits.
"""

import os
import signal
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any


class Stream:
    """A file descriptor that a process is started with; there, what it is by then."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.number),)


def _received(stream: Any) -> int:
    return stream.detach()


def work(arguments: list[str], environment: dict[str, str], *streams: int) -> None:
    """`python arguments...` in this process, with the streams and the environment of another."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    code = arguments[arguments.index("-c") + 1]
    sys.argv = ["-c"]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    # What is pickled is found by its module's name, which is not this.
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.fork_server import StockProcess
    from tests.worker import Stream, work

    process = StockProcess(target=work, args=(sys.argv[1:], dict(os.environ), Stream(0), Stream(1), Stream(2)))
    process.start()
    signal.signal(signal.SIGTERM, lambda *_: process.kill())
    process.join()
    sys.exit(process.exitcode)
