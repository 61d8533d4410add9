"""Processes of their own: copies of one that has imported everything already, and none that a test waits for in vain."""

import faulthandler
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.fork_server import OurProcess, StockProcess

LIMIT = 240.0
"""Seconds after which a process is taken to hang."""


class Done(NamedTuple):
    """How a process ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run_fresh(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    """`python arguments...` in a process that imports for itself, for what is about just that."""
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        said = process.communicate()
        raise AssertionError(f"{arguments[:2]} hung for {LIMIT:g} s:\n{said[1]}") from None
    return Done(process.returncode, *said)


def start(target: Callable[..., None], *arguments: Any, kind: type[BaseProcess] = OurProcess) -> BaseProcess:
    """A process that calls `target`, without a network if it is of ours, started in the time that a fork takes."""
    process = kind(target=target, args=arguments)
    process.start()
    return process


def ended(process: BaseProcess, within: float | None = None) -> bool:
    """Wait for a process; whether it has ended. Without `within`, it must: one that hangs is killed, and says where."""
    process.join(LIMIT if within is None else within)
    if not process.is_alive():
        return True
    if within is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGABRT)
        process.join(5)
        process.kill()
        process.join()
        raise AssertionError(f"the process hung for {LIMIT:g} s; where, its standard error says")
    return False


def run_script(script: Path, *arguments: str, cwd: Path, **environment: str) -> Done:
    """`python script arguments...`, as a user would run it from `cwd`."""
    return _run(_script, str(script), arguments, cwd=cwd, environment=environment)


def run_code(code: str, cwd: Path, **environment: str) -> Done:
    """`python -c code` from `cwd`."""
    return _run(_code, code, (), cwd=cwd, environment=environment)


def run_stock(code: str, *arguments: str, cwd: Path, **environment: str) -> Done:
    """`python -c code arguments...` from `cwd`, where nothing of ours has been imported."""
    return _run(_code, code, arguments, cwd=cwd, environment=environment, kind=StockProcess)


def _run(
    body: Callable[[str], None],
    program: str,
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    kind: type[BaseProcess] = OurProcess,
) -> Done:
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(_child, body, program, arguments, cwd, environment, said, kind=kind)
        try:
            ended(process)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{said[1].read_text()}") from None
        code = process.exitcode
        assert code is not None
        return Done(code, said[0].read_text(), said[1].read_text())


def _child(
    body: Callable[[str], None],
    program: str,
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    said: tuple[Path, Path],
) -> None:
    redirect(*said)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    try:
        body(program)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def redirect(stdout: Path, stderr: Path) -> None:
    """Have this process write to files, what is said below Python too."""
    for number, path in ((1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.stderr)


def _script(path: str) -> None:
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def _code(code: str) -> None:
    sys.path.insert(0, "")
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
