"""A headless Chromium that a test can open a file in, spoken to over its own debugging pipe."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 40.0


def chromium() -> str | None:
    """The path of a Chromium, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab, and whatever it complained of."""

    def __init__(self, to_browser: int, from_browser: int):
        self.complaints: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._buffer, self._n_sent, self._session = b"", 0, None
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.command("Page.navigate", url=path.absolute().as_uri())
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression gives; promises are awaited."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true. Raises TimeoutError if it does not become so."""
        deadline = time.monotonic() + _PATIENCE
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} did not become true; the page said {self.complaints}")
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
        data = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and wait for what it gives."""
        self._n_sent += 1
        message: dict[str, Any] = {"id": self._n_sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._n_sent:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._from, 1 << 16)
            if not received:
                raise EOFError("the browser went away")
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([one.get("value", one.get("description")) for one in params["args"]]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.complaints.append(f"it asked the network for {url}")


@contextmanager
def browser(executable: str) -> Iterator[Page]:
    """A page in a browser of its own, which is stopped on exit."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        to_browser, from_browser = os.pipe(), os.pipe()

        def descriptors() -> None:
            # The protocol is read on 3 and written on 4.
            read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        process = subprocess.Popen(
            [executable, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])


# axe-core looks for what keeps people from reading a page.

AXE = "SAE_LENS_E2E_AXE"
"""The environment variable that names axe-core's axe.min.js, if it is not in node_modules here."""


def axe() -> Path | None:
    """The path of axe-core's script, or None where there is none."""
    named = os.environ.get(AXE)
    path = Path(named) if named else Path(__file__).parents[1] / "node_modules/axe-core/axe.min.js"
    return path if path.is_file() else None


def check_barriers(*pages: Path, ready: str = "true") -> None:
    """Fail if axe-core finds anything serious on pages, wide and narrow, light and dark, once `ready`; skip where one cannot look."""
    executable, script = chromium(), axe()
    if executable is None or script is None:
        pytest.skip(f"it takes a Chromium, and axe-core: npm install axe-core, or {AXE}=PATH/axe.min.js")
    with browser(executable) as page:
        for path in pages:
            for width, dark in ((1280, False), (390, True)):
                page.open(path, width=width, dark=dark)
                page.wait_for(ready)
                assert barriers(page, script) == [], path.name


def barriers(page: Page, script: Path) -> list[str]:
    """What axe-core finds serious or critical on an open page, everything that is folded opened."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.evaluate(f"{script.read_text(encoding='utf-8')};0")
    found = page.evaluate("axe.run().then((found) => found.violations)")
    return [
        f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
