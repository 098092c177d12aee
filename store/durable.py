"""Makes a run survive a power cut, about a second behind: acknowledged becomes durable.

A thread of its own syncs what has changed since it last looked: first shards and metadata, then the
journal's lines, then its records. So a record that is durable speaks of a plane that is durable.
`durable` counts the records of which that is true; the journal keeps marks of it, so `refocus
recover` knows which planes a power cut cannot have touched.

Nothing that acknowledges a plane waits for this. Three quarters of a second between two rounds, and
what a round takes, is what a power cut may cost.

A disk that fails while it syncs, or as a file is closed, may have dropped what it was given, and
would not say so a second time. From then on nothing counts as durable, and `trouble` says why.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from store import disk

PAUSE_S = 0.75


class Durability:
    """The thread that syncs one run."""

    def __init__(self, journal: tuple[Path, ...], records: Callable[[], int]) -> None:
        """*journal*: its files, in the order to sync them; *records*: how many it has by now."""
        self._journal = journal
        self._records = records
        self._changed: set[Path] = set()
        self._lock = threading.Lock()
        self._round = threading.Lock()
        self._stopping = threading.Event()
        self.durable = 0
        """Records that survive a power cut, together with their planes."""
        self.trouble = ""
        """Why nothing more becomes durable."""
        self._thread = threading.Thread(target=self._work, name="refocus-durable", daemon=True)

    def start(self) -> None:
        """Start the thread; `close` ends it."""
        self._thread.start()

    def changed(self, path: Path) -> None:
        """Any thread. This file or folder was changed; say so after that, and before its record."""
        with self._lock:
            self._changed.add(path)

    def fail(self, error: OSError) -> None:
        """Any thread. What was written may be lost: from now on nothing becomes durable."""
        self.trouble = self.trouble or str(error)

    def sync(self) -> None:
        """Make everything up to now durable. Raises OSError, now and from then on."""
        with self._round:  # what another round has taken upon itself is not durable before its end
            records = self._records()
            with self._lock:
                changed, self._changed = self._changed, set()
            try:
                # A folder after what is in it: a name that is durable stands for a whole file.
                for path in sorted(changed, reverse=True):
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        disk.sync(path)
                for path in self._journal:  # gone: the run was moved, or its disk unplugged
                    disk.sync(path)
            except OSError as error:
                self.fail(error)
            if self.trouble:
                raise OSError(f"what was written may not be on the disk: {self.trouble}")
            self.durable = records

    def close(self) -> None:
        """End the thread; what has changed since its last round stays as it is. May be repeated."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._stopping.wait(PAUSE_S):
            if not (self._changed or self._records() > self.durable):
                continue
            try:
                self.sync()
            except OSError:  # told by `trouble`
                return
