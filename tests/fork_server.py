"""Servers that have imported everything, of which every process that a test starts is a copy: one for all workers of a test run."""

import os
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import ClassVar

import pytest


class SharedServer(forkserver.ForkServer):
    """A fork server of this process, or the one that the process which started this one has shared."""

    def __init__(self, name: str, preload: list[str], offline: bool = True) -> None:
        super().__init__()
        self.set_forkserver_preload(preload)
        self._offline = offline
        self._shares = False
        self._variable = f"SAE_LENS_E2E_TESTS_{name}_SERVER"

    def share(self) -> None:
        """Start it, for this process and all that this one starts, for as long as this one lives."""
        self._shares = True
        self.ensure_running()
        # The first byte of an address without a file is 0, which an environment cannot hold.
        os.environ[self._variable] = str(self._forkserver_address).replace("\0", "@")

    def ensure_running(self) -> None:
        shared = os.environ.get(self._variable)
        if shared is None or self._shares:
            with pytest.MonkeyPatch.context() as patch:
                if self._offline:
                    # Read when it is imported, and that is here.
                    patch.setenv("HF_HUB_OFFLINE", "1")
                super().ensure_running()
        elif self._forkserver_address is None:
            resource_tracker.ensure_running()
            self._forkserver_address = shared.replace("@", "\0")
            self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)


# Processes of one thread, so that a copy cannot wait for a lock that a thread of ours held at that moment.
OURS = SharedServer("OURS", ["sae_lens_e2e.cli.finetune", "tests.reliability.runs", "tests.read_flags"])
# Another, that knows SAELens alone: of the workers of a test run, which may ask a Hub, and of whoever loads what we have saved.
STOCK = SharedServer("STOCK", ["sae_lens", "pytest"], offline=False)


class _Popen(popen_forkserver.Popen):
    server: ClassVar[SharedServer]

    def _launch(self, process_obj: BaseProcess) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", self.server.connect_to_new_process)
            super()._launch(process_obj)  # pyright: ignore[reportAttributeAccessIssue]


class _OurPopen(_Popen):
    server = OURS


class _StockPopen(_Popen):
    server = STOCK


class OurProcess(ForkServerProcess):
    """A copy of the server that has imported this package."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _OurPopen:  # noqa: N802
        return _OurPopen(process_obj)


class StockProcess(ForkServerProcess):
    """A copy of the one that has imported SAELens alone."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _StockPopen:  # noqa: N802
        return _StockPopen(process_obj)
