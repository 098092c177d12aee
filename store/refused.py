"""What the system did not let us do to a run, said so that somebody can do something about it."""

import errno
from pathlib import Path

from refocus.errors import DiskError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def refused(path: Path, what: str, error: OSError) -> RunError:
    """The error to raise where *what* ("not finished") is because of *error*.

    DiskError where the disk is full.
    """
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return DiskError(f"{path}: {what}: the disk is full ({why}); make room, then run it again")
    if error.errno in _READ_ONLY:
        return RunError(
            f"{path}: {what}: it cannot be written to ({why}); make it writable, or copy the run "
            "to where you may write, then run it again"
        )
    return RunError(f"{path}: {what} ({error}); see to it, then run it again")
