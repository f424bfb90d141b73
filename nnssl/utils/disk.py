"""What the operating system refuses, in the words of a user; and writers that keep its reasons to themselves."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from nnssl.errors import UserError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the command again: nothing that was there is lost"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the command again"),
    errno.EFBIG: ("a file would become larger than allowed here", "raise the limit (ulimit -f) or use another disk"),
    errno.EROFS: ("the file system is read-only", "use a folder that can be written to"),
    errno.EACCES: ("permission denied", "ask for the permission, or use another folder"),
    errno.EPERM: ("permission denied", "ask for the permission, or use another folder"),
    errno.EIO: ("the disk reports an error", "look at the messages of the system; copy the data to another disk"),
    errno.ESTALE: ("the network folder is gone", "mount it again, then run the command again"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n) or use fewer processes"),
    errno.ENOTDIR: ("a file is in the place of a folder", "remove or rename it"),
    errno.EISDIR: ("a folder is in the place of a file", "remove or rename it"),
    errno.ENAMETOOLONG: ("a name is too long for the file system", "shorten the names of cases or folders"),
}
_PROBE_BYTES = 1 << 20


def told_system_error(error: BaseException) -> UserError | None:
    """The refusal of the operating system that made ``error``, itself or through others; None if there is none."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _REASONS:
            message, fix = _REASONS[current.errno]
            return UserError(message, where=current.filename, found=current.strerror, fix=fix)
        current = current.__cause__ or current.__context__
    return None


@contextmanager
def disk_errors_named(folder: str | os.PathLike[str]) -> Iterator[None]:
    """For writers that fail without a reason: if the block raises, it is tried whether ``folder`` takes data at all.

    Raises:
        OSError: why it does not, in place of the error of the block.
    """
    try:
        yield
    except RuntimeError:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        raise
