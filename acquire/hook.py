"""What Micro-Manager calls: stamp the frame, hand it over, get out of the way.

These functions run on Micro-Manager's threads, and what goes wrong in them goes wrong in the user's
experiment: an exception aborts the acquisition or hangs it for ever, a hook that returns None
instead of its event cancels all that is left, without a word. So nothing raises through a hook, and
everything that takes time or can fail happens behind the intake.

The two ways in which Refocus stops an acquisition are both loud: the raw queue stays full (the disk
cannot keep up), or the recorder is told to stop. Then the event hooks return None, which is
Micro-Manager's own way to end the remaining events in order.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy.typing as npt

from acquire.header import UNKNOWN, Hardware
from acquire.intake import Intake

log = logging.getLogger(__name__)

Event = dict[str, Any]
E = TypeVar("E")
MAX_STAGE_READINGS = 100_000
"""Readings kept for frames that never came (an aborted acquisition), about 30 MB."""


class Hook:
    """The callbacks of one run."""

    def __init__(
        self,
        intake: Intake,
        *,
        read_hardware: Callable[[], Hardware] | None = None,
        micromanager_saves: bool = False,
        on_trouble: Callable[[str], None] = log.error,
    ) -> None:
        self._intake = intake
        self._read_hardware = read_hardware
        self._micromanager_saves = micromanager_saves
        self._on_trouble = on_trouble
        self._hardware: dict[frozenset[tuple[str, Any]], Hardware] = {}
        self.stopping = threading.Event()
        """Set it to end the acquisition after the events that are already under way."""
        self.events: int | None = None
        """Events submitted so far; None where `event` was not among the acquisition's hooks."""

    def event(self, event: Event) -> Event | None:
        """event_generation_hook_fn: counts one submitted image."""
        self.events = (self.events or 0) + 1
        return self._go_on(event)

    def hardware(self, event: Event | list[Event]) -> Event | list[Event] | None:
        """post_hardware_hook_fn: reads the stage, once for an image or a whole hardware sequence.

        Images come later and on another thread, so a reading is kept under the axes it is for.
        """
        if self._read_hardware is not None:
            try:
                reading = self._read_hardware()
            except Exception as error:  # noqa: BLE001 - whatever the core raises must not pass
                self._on_trouble(f"stage and camera could not be read: {error}")
            else:
                if len(self._hardware) > MAX_STAGE_READINGS:
                    self._hardware.clear()
                for one in event if isinstance(event, list) else [event]:
                    self._hardware[_key(one.get("axes"))] = reading
        return self._go_on(event)

    def image(
        self, image: npt.NDArray[Any], metadata: dict[str, Any]
    ) -> tuple[npt.NDArray[Any], dict[str, Any]] | None:
        """image_process_fn: stamps the image and enqueues a reference to it.

        Returns None where Refocus is the writer, and what it was given where Micro-Manager saves
        as well.
        """
        hook_time_ns, wall_time_ns = time.monotonic_ns(), time.time_ns()
        try:
            tags = dict(metadata or {})  # Micro-Manager goes on to change its own
            hardware = self._hardware.pop(_key(tags.get("Axes")), UNKNOWN)
            waits = not self.stopping.is_set()
            if not self._intake.put(
                image, tags, hardware, wall_time_ns, hook_time_ns, may_wait=waits
            ):
                self._overflow()
        except Exception as error:  # noqa: BLE001 - an exception here would abort the experiment
            self._on_trouble(f"an image could not be taken: {error!r}")
        return (image, metadata) if self._micromanager_saves else None

    def _overflow(self) -> None:
        if not self.stopping.is_set():
            self.stopping.set()
            what = "frames go on to Micro-Manager's own storage only" * self._micromanager_saves
            self._on_trouble(
                "the disk does not keep up: the raw queue stayed full. "
                f"{what or 'The acquisition is being stopped'}; use a faster disk, a lower rate or "
                "a larger [acquire] raw_queue_mib"
            )

    def _go_on(self, event: E) -> E | None:
        return None if self.stopping.is_set() else event


def _key(axes: Mapping[str, Any] | None) -> frozenset[tuple[str, Any]]:
    return frozenset((axes or {}).items())
