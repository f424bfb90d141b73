"""Requests to end a training early without losing anything: SIGTERM, Ctrl-C, or a stop file."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context in which signals set a flag that the training loop looks at between two steps.

    A second Ctrl-C interrupts at once. Outside the main thread only the stop file is watched, since Python delivers
    signals to the main thread.

    Args:
        stop_file: the request is also made by creating this file; it is removed when the context ends. None watches
            for signals only.
    """

    def __init__(self, stop_file: Path | None):
        self.stop_file = stop_file
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._remove_stop_file()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._remove_stop_file()

    def __bool__(self) -> bool:
        if self.reason is None and self.stop_file is not None and self.stop_file.exists():
            self.reason = f"stop file {self.stop_file.name}"
        return self.reason is not None

    def _remove_stop_file(self) -> None:
        if self.stop_file is not None:
            self.stop_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
