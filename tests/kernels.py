"""Notebook kernels that have imported everything: copies, as the other processes of the tests are."""

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from tests.processes import redirect, start


class Kernel:
    """A kernel's process, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], cwd: str, env: Mapping[str, str]) -> None:
        self._process = start(_run, command, cwd, dict(env))
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


async def launch_copy(self: LocalProvisioner, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
    """Instead of `LocalProvisioner.launch_kernel`: the kernel is not the first of a process group, so signals go to it alone."""
    kernel = Kernel(cmd, kwargs.get("cwd", os.getcwd()), kwargs["env"])
    self.process, self.pid = kernel, kernel.pid  # pyright: ignore[reportAttributeAccessIssue]
    return self.connection_info


def _run(command: list[str], cwd: str, env: dict[str, str]) -> None:
    redirect(Path(os.devnull), Path(os.devnull))
    os.chdir(cwd)
    os.environ.update(env)
    # python -m ipykernel_launcher -f FILE
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)
