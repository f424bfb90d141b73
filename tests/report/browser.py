"""A headless Chromium, driven by ChromeDriver over WebDriver (plain HTTP with JSON)."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "no Chromium with ChromeDriver on the PATH (Debian: chromium, chromium-driver)"
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
]


class Browser:
    """One session. Every request of a page, and every message of its console, is kept."""

    def __init__(self, url: str):
        options = {"binary": CHROMIUM, "args": _FLAGS}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self._url = url
        self._session = _call("POST", f"{url}/session", {"capabilities": {"alwaysMatch": always}})["sessionId"]

    def command(self, method: str, path: str, **content: Any) -> Any:
        return _call(method, f"{self._url}/session/{self._session}/{path}", content if method == "POST" else None)

    def open(self, file: Path) -> None:
        self.command("POST", "url", url=file.absolute().as_uri())

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        return self.command("POST", "execute/sync", script=f"return {script}", args=[])

    def click(self, selector: str) -> None:
        element = self.command("POST", "element", using="css selector", value=selector)
        self.command("POST", f"element/{next(iter(element.values()))}/click")

    def press(self, key: str) -> None:
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.command("POST", "actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def screen(self, width: int, height: int, *, dark: bool = False, mobile: bool = False) -> None:
        """Size in CSS pixels, and what the system of the user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.command("GET", "screenshot")))

    def console(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.command("POST", "se/log", type="browser")]

    def requests(self) -> list[str]:
        """Addresses that pages asked for since the last call."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self.command("POST", "se/log", type="performance")
        ]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def _devtools(self, command: str, parameters: dict[str, Any]) -> None:
        self.command("POST", "goog/cdp/execute", cmd=command, params=parameters)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url)
        session = Browser(url)
        try:
            yield session
        finally:
            session.command("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


def _wait(url: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            return _call("GET", f"{url}/status")
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _call(method: str, url: str, content: Any = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url.rstrip("/"), data, {"Content-Type": "application/json"}, method=method)
    # a proxy of the environment must not see addresses of this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
