"""One writer a run, and a way to tell a live run from a dead one.

The writer holds an operating-system lock on journal/writer.lock for as long as it lives. The system
drops the lock with the process, however it died, so nothing stale is left behind: a run whose lock
can be taken has no writer. (A forked child shares its parent's lock, and would keep it: it closes
its share at once.) A reader that looks takes a shared lock for an instant, so a writer that
starts asks again for half a second before it believes that there is another.

On a file system without locks, as some network shares are, a run is written all the same: every run
looks dead there, and nobody keeps a second writer out. The log says so.
"""

import errno
import logging
import os
import sys
import time
import weakref
from io import FileIO
from pathlib import Path

from refocus.errors import LockedError

log = logging.getLogger(__name__)

_TRIES = 50
_PAUSE_S = 0.01
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class WriterLock:
    """Exclusive lock on a file; released by `release`, or by the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raise LockedError where another writer, in this process or another, holds the lock."""
        self._file = path.open("ab", buffering=0)
        _held.add(self)
        try:
            taken = _take(self._file)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._file.close()
                raise
            log.warning(
                "%s: no locks on this file system (%s): the run looks dead while it is written, "
                "and a second writer is not kept out",
                path,
                error.strerror,
            )
            return
        if not taken:
            self._file.close()
            raise LockedError(f"{path}: this run has another writer; wait for it or stop it")

    def release(self) -> None:
        """Give the lock back. A second call does nothing."""
        self._file.close()


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()
"""All of this process, for a child to close: a fork's hooks cannot be taken back one by one."""


def _release_all() -> None:
    for lock in _held:
        lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_release_all)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock at *path*."""
    try:
        with path.open("rb", buffering=0) as file:
            return not _try_lock(file, shared=True)
    except OSError:  # no such file, or no locks here
        return False


def _take(file: FileIO) -> bool:
    for _ in range(_TRIES):
        if _try_lock(file):
            return True
        time.sleep(_PAUSE_S)
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
