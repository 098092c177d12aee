"""Keeps a run from filling its disk: refuses one that does not fit, and says when to stop.

A run is stopped while there is still room for what is on its way then: the raw queue, the exposures
under way, the planes that the engine still has. That room is the reserve. So a disk that gets full,
by this run or by anything else, costs no plane that came.

Asking a file system costs 2 us, on a network share a round trip. It is asked once in ASK_S, and
besides whenever an eighth of the reserve has been written since: a disk of 2 GB/s does not get
through the reserve unseen.
"""

import shutil
import time
from pathlib import Path

from refocus.errors import DiskError

ASK_S = 0.25
SHARE = 8
"""The part of the reserve that may be written before the file system is asked again."""


class DiskGuard:
    """Watches the disk of *folder*, which need not exist yet. Reserve 0: it only refuses."""

    def __init__(self, folder: Path, reserve_bytes: int) -> None:
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._unseen_bytes = 0
        self._asked_s = -ASK_S

    def require(self, wanted_bytes: int, what: str) -> None:
        """Raise DiskError where *wanted_bytes* for *what* would not leave the reserve free."""
        free = self._free_bytes()
        if free is None or wanted_bytes + self._reserve_bytes <= free:
            return
        raise DiskError(
            f"{what} needs {_size(wanted_bytes)}, and [store] reserve_mib keeps "
            f"{_size(self._reserve_bytes)} free; the disk of {self._folder} has {_size(free)} "
            "free. Free some space, choose another disk, or acquire less"
        )

    def wrote(self, nbytes: int) -> str:
        """Count what was written; returns why writing must stop now, or nothing."""
        self._unseen_bytes += nbytes
        now_s = time.monotonic()
        early = now_s - self._asked_s < ASK_S
        if not self._reserve_bytes or (early and self._unseen_bytes < self._reserve_bytes // SHARE):
            return ""
        free = self._free_bytes()
        self._unseen_bytes, self._asked_s = 0, now_s
        if free is None or free > self._reserve_bytes:
            return ""
        return (
            f"the disk of {self._folder} has {_size(free)} free, and [store] reserve_mib keeps "
            f"{_size(self._reserve_bytes)} free"
        )

    def _free_bytes(self) -> int | None:
        """None where the file system does not say: then the writes themselves will."""
        folder = self._folder.absolute()
        try:
            for path in (folder, *folder.parents):
                if path.exists():
                    return shutil.disk_usage(path).free
        except OSError:
            return None
        return None  # on Windows a whole drive may be gone


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
