"""Which images are still to come, and what the hardware was for each.

pycromanager ends normally when a device or a hook fails, with fewer images than events and without
a word, so what was submitted is held against what came. Images come later than the readings taken
for them, on another thread, so both are kept under the axes they belong to. Two cameras give two
images for one event: the second is recognised, gets the same reading, and hides none that is
missing.

Three of Micro-Manager's threads call in; the lock is held for a dictionary access.
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from acquire.header import UNKNOWN, Hardware

log = logging.getLogger(__name__)

Key = frozenset[tuple[str, str]]

MOST_READINGS = 100_000
"""Readings kept for images that have not come (a hardware sequence can be long), about 40 MB."""
RECENT = 256
"""Images after which a second one of the same event is no longer recognised."""


def key(axes: Any) -> Key:
    """Name of an event or image; total, whatever a user's script puts into its axes."""
    if not isinstance(axes, Mapping):
        return frozenset()
    return frozenset((str(name), str(value)) for name, value in axes.items())


class Expected:
    """Events submitted, readings taken, images not yet come."""

    def __init__(self) -> None:
        self.submitted: int | None = None
        """Events so far; None where nobody counts them."""
        self._awaited: Counter[Key] = Counter()
        self._readings: OrderedDict[Key, Hardware] = OrderedDict()
        self._recent: OrderedDict[Key, Hardware] = OrderedDict()
        self._unexpected = 0
        self._lock = threading.Lock()

    def submit(self, axes: Any) -> None:
        """Event thread: an image was asked for."""
        name = key(axes)
        with self._lock:
            self.submitted = (self.submitted or 0) + 1
            self._awaited[name] += 1

    def read(self, axes: Any, hardware: Hardware) -> None:
        """Acquisition thread: the hardware stands as it will for the image of *axes*."""
        name = key(axes)
        with self._lock:
            self._readings[name] = hardware
            while len(self._readings) > MOST_READINGS:
                self._readings.popitem(last=False)

    def arrive(self, axes: Any) -> Hardware:
        """Image thread: an image came; what the hardware was for it."""
        name = key(axes)
        with self._lock:
            if self._awaited[name] > 1:
                self._awaited[name] -= 1
            elif self._awaited.pop(name, 0) == 0 and name not in self._recent:
                self._unexpected += 1
            hardware = self._readings.pop(name, None) or self._recent.get(name, UNKNOWN)
            self._recent[name] = hardware
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return hardware

    @property
    def missing(self) -> int:
        """Images that were submitted and have not come.

        An image under axes that nobody submitted stands for one that is awaited: Micro-Manager has
        renamed it.
        """
        return max(0, self._awaited.total() - self._unexpected)

    def frames(self, received: int) -> int | None:
        """Frames that should be in the run: a colour image is three, what is missing is one."""
        return None if self.submitted is None else received + self.missing

    def finding(self, *, exposures: int, received: int, failed: int, interrupted: bool) -> str:
        """What was lost of *exposures* images, which are *received* frames; in words, or nothing.

        *failed*: frames that could not be saved.
        """
        findings = []
        if failed:
            findings.append(f"{failed} of {received} frames could not be saved")
        if self.missing and not interrupted:
            findings.append(
                f"{self.submitted} events were submitted to Micro-Manager, {exposures} images "
                "came; Micro-Manager's own messages name the device or preset at fault"
            )
        if not received and not findings and not interrupted:
            findings.append("not one frame came through the hook")
        if self.submitted is None and received:
            log.info("only recorder.hook is in use: nothing counts what was submitted")
        return "; ".join(findings)
