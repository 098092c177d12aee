"""What went wrong while a run was recorded or filled, in lines for people; any thread tells."""

import logging
import threading

log = logging.getLogger(__name__)

MOST_LINES = 100
"""Different lines kept; a run that goes wrong in more ways is described well enough."""


class Trouble:
    """Keeps every line once, with how often it was told; the first time it is logged, too."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}
        self._lock = threading.Lock()

    def tell(self, line: str) -> None:
        """Something went wrong."""
        with self._lock:
            if line not in self._told and len(self._told) >= MOST_LINES:
                return
            self._told[line] = self._told.get(line, 0) + 1
            first = self._told[line] == 1
        if first:
            log.error(line)

    @property
    def lines(self) -> list[str]:
        """What went wrong so far, one line each, however often it did."""
        with self._lock:
            told = list(self._told.items())
        return [line if times == 1 else f"{line} ({times} times)" for line, times in told]
