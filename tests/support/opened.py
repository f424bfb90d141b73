"""Which files are opened in a folder, by Python or by libraries, as the system sees it (Linux's inotify)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_OPEN = 0x20
_EVENT = struct.Struct("iIII")


class OpenedFiles:
    """Names of files that are opened in ``folders`` while it watches; a directory listing does not count.

    >>> with OpenedFiles(Path("labels")) as opened:
    ...     train()
    >>> opened.names
    set()
    """

    def __init__(self, *folders: Path):
        self.folders = folders
        self.names: set[str] = set()

    def __enter__(self) -> OpenedFiles:
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify is not there")
        for folder in self.folders:
            if library.inotify_add_watch(self._descriptor, os.fsencode(folder), _OPEN) < 0:
                raise OSError(ctypes.get_errno(), "cannot be watched", str(folder))
        return self

    def __exit__(self, *error: object) -> None:
        self.collect()
        os.close(self._descriptor)

    def collect(self) -> set[str]:
        """Names seen so far."""
        while True:
            try:
                data = os.read(self._descriptor, 1 << 20)
            except BlockingIOError:
                return self.names
            while data:
                _, _, _, length = _EVENT.unpack_from(data)
                name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                if name:
                    self.names.add(os.fsdecode(name))
                data = data[_EVENT.size + length :]
