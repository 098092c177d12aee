"""One writer a run, and a way to tell a live run from a dead one.

The writer holds an operating-system lock on journal/writer.lock for as long as it lives. The system
drops the lock with the process, however it died, so nothing stale is left behind: a run whose lock
can be taken has no writer. (On a file system without locks, as some network shares are, every run
looks dead.)
"""

import sys
from io import FileIO
from pathlib import Path

from refocus.errors import RunError


class WriterLock:
    """Exclusive lock on a file; released by `release`, or by the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raise RunError where another writer, in this process or another, holds the lock."""
        self._file = path.open("ab", buffering=0)
        if not _try_lock(self._file):
            self._file.close()
            raise RunError(f"{path}: this run has another writer; wait for it or stop it")

    def release(self) -> None:
        """Give the lock back. A second call does nothing."""
        self._file.close()


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock at *path*."""
    try:
        with path.open("rb", buffering=0) as file:
            return not _try_lock(file, shared=True)
    except OSError:  # no such file, or no locks here
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: FileIO, shared: bool = False) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        if shared:  # closing a handle leaves a byte range locked for a moment on Windows
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        return True

else:
    import fcntl

    def _try_lock(file: FileIO, shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
