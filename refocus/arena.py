"""Memory that a link and its worker share: slots for one plane each, in one mapped file.

Pixels of a frame that lie in a slot need not travel: the message that would carry them names the
slot. That is for a worker on the same computer; one that cannot open the arena gets its pixels in
the messages. Whose turn it is with a slot is agreed by messages alone (acquire/shared.py).

On Linux the file is in /dev/shm, which is memory. Elsewhere on POSIX it is in the folder for
temporary files, and it is mode 0600 everywhere. Its room is taken when it is made: a mapped file
that finds no room later kills the process that writes to it. On Windows it is no file but named
memory, which is gone with the last process that uses it. What a killed process left, `sweep`
removes.

The first page holds the name, so that nobody takes another file, or new memory, for the arena.
"""

import contextlib
import mmap
import os
import secrets
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from refocus.errors import WireError
from refocus.frame import Pixels

PAGE = 4096
"""Slots begin at whole pages, so that a plane can go from its slot to the disk as it lies."""
MOST_BYTES = 1 << 30
"""Of all slots together."""
PREFIX = "refocus-arena-"
"""Beginning of the file's name; the process that made it follows."""


class Arena:
    """*slots* places of *slot_bytes* each. Made by `make` (the link) or `open` (a worker)."""

    def __init__(self, name: str, memory: mmap.mmap, slots: int, slot_bytes: int) -> None:
        self.name = name
        """What the other side opens it by."""
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._memory: mmap.mmap | None = memory

    @classmethod
    def make(cls, slots: int, plane_bytes: int) -> "Arena":
        """An arena for planes of *plane_bytes*, with *slots* slots or as many as there is room for.

        Takes no more than `MOST_BYTES`, and half of what is free. Raises OSError where that is not
        enough for a single slot.
        """
        slot_bytes = _whole_pages(plane_bytes)
        token = f"{PREFIX}{os.getpid()}-{secrets.token_hex(16)}"
        if sys.platform == "win32":
            name, room = token, MOST_BYTES
        else:
            folder = _folder()
            name, room = str(folder / token), shutil.disk_usage(folder).free // 2
        slots = min(slots, min(room, MOST_BYTES) // slot_bytes)
        if slots < 1:
            raise OSError(f"a plane of {plane_bytes} bytes has no room at {name}")
        memory = _make(name, PAGE + slots * slot_bytes)
        memory[: len(name.encode())] = name.encode()
        return cls(name, memory, slots, slot_bytes)

    @classmethod
    def open(cls, name: str, slots: int, slot_bytes: int) -> "Arena":
        """The arena that the other side made. Raises OSError or WireError where it is none."""
        if not Path(name).name.startswith(PREFIX):
            raise WireError(f"{name!r} is not the name of an arena")
        if slots < 1 or slot_bytes < 1 or slot_bytes % PAGE or slots * slot_bytes > MOST_BYTES:
            raise WireError(f"an arena cannot have {slots} slots of {slot_bytes} bytes")
        memory = _open(name, PAGE + slots * slot_bytes)
        expected = name.encode()
        if memory[: len(expected)] != expected:
            raise WireError(f"{name}: is not the arena that was offered")
        return cls(name, memory, slots, slot_bytes)

    def plane(self, slot: int, shape: tuple[int, int], dtype: str) -> Pixels:
        """A plane (y, x) in a slot, writable; what it holds is whatever was written there last.

        It stays readable after `close`. Raises WireError for a slot that there is not, and for a
        plane that does not fit.
        """
        nbytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
        if self._memory is None or not 0 <= slot < self.slots or nbytes > self.slot_bytes:
            raise WireError(
                f"{shape} {dtype} does not fit into slot {slot} "
                f"of {self.slots} with {self.slot_bytes} bytes each"
            )
        start = PAGE + slot * self.slot_bytes
        plane: Pixels = np.frombuffer(self._memory, dtype, shape[0] * shape[1], start)
        return plane.reshape(shape)

    def close(self) -> None:
        """Let go of it. The memory lives on as long as a plane in it is in use."""
        self._memory = None

    def remove(self) -> None:
        """Nobody can open it any more; who has opened it keeps it. For the side that made it."""
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                Path(self.name).unlink()


def sweep() -> None:
    """Remove what processes that were killed left."""
    if sys.platform == "win32":
        return
    for path in _folder().glob(f"{PREFIX}*-*"):
        pid = path.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):  # another user's
                path.unlink()


def _folder() -> Path:
    memory = Path("/dev/shm")
    usable = sys.platform == "linux" and os.access(memory, os.W_OK | os.X_OK)
    return memory if usable else Path(tempfile.gettempdir())


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _make(name: str, size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size, tagname=name)
    # Not to be reached through a link that somebody laid, and ours alone to read.
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        _take_room(file, size)
        return mmap.mmap(file, size)
    except BaseException:
        Path(name).unlink()
        raise
    finally:
        os.close(file)


def _take_room(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, 1 << 20):  # macOS
        os.pwrite(file, bytes(min(1 << 20, size - start)), start)


def _open(name: str, size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size, tagname=name)
    file = os.open(name, os.O_RDWR | os.O_NOFOLLOW)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size != size:
            raise WireError(f"{name}: is not an arena of {size} bytes that is ours")
        return mmap.mmap(file, size)
    finally:
        os.close(file)
