"""What Micro-Manager calls: stamp the image, hand it over, get out of the way.

These functions run on Micro-Manager's threads, and what goes wrong in them goes wrong in the user's
experiment: an exception aborts the acquisition or hangs it for ever, a hook that returns None
instead of its event cancels all that is left, without a word. So nothing raises through a hook, and
everything that takes time or can fail happens behind the intake.

Refocus stops an acquisition in three cases, loudly each time: the raw queue stays full (the disk
cannot keep up), a raw frame could not be written, or the recorder is told to stop. Then the event
hooks return None, which is Micro-Manager's own way to end the remaining events in order. Where
Micro-Manager saves the frames as well, only the last of the three stops it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from acquire.expected import Expected
from acquire.header import Hardware
from acquire.intake import Intake

log = logging.getLogger(__name__)

Event = dict[str, Any]
E = TypeVar("E")


class Hook:
    """The callbacks of one run."""

    def __init__(
        self,
        intake: Intake,
        *,
        read_hardware: Callable[[Mapping[str, Any]], Hardware] | None = None,
        micromanager_saves: bool = False,
        on_trouble: Callable[[str], None] = log.error,
    ) -> None:
        self._intake = intake
        self._read_hardware = read_hardware
        self._micromanager_saves = micromanager_saves
        self._on_trouble = on_trouble
        self._may_wait = True
        self.expected = Expected()
        self.stopping = threading.Event()
        """Set it to end the acquisition after the events that are already under way."""
        self.closed = False
        """Set where nobody records any more; it ends the acquisition in the same way."""

    def event(self, event: Event) -> Event | None:
        """event_generation_hook_fn: counts one submitted image."""
        try:
            self.expected.submit(event.get("axes"))
        except Exception as error:  # noqa: BLE001 - must not pass a hook
            self._on_trouble(f"an event could not be counted: {error!r}")
        return self._go_on(event)

    def hardware(self, event: Event | list[Event]) -> Event | list[Event] | None:
        """post_hardware_hook_fn: reads the stage, once for an image or a hardware sequence."""
        if self._read_hardware is not None:
            try:
                events = event if isinstance(event, list) else [event]
                # What only some events of a sequence say must be read for the others.
                said = events[0].keys() & set.intersection(*(set(one) for one in events))
                reading = self._read_hardware({name: events[0][name] for name in said})
                for one in events:
                    self.expected.read(one.get("axes"), reading)
            except Exception as error:  # noqa: BLE001 - whatever the core raises must not pass
                self._on_trouble(f"stage and camera could not be read: {error}")
        return self._go_on(event)

    def image(
        self, image: npt.NDArray[Any], metadata: dict[str, Any]
    ) -> tuple[npt.NDArray[Any], dict[str, Any]] | None:
        """image_process_fn: stamps the image and enqueues a reference to it.

        Returns None where Refocus is the writer; from then on the image is read-only. Where
        Micro-Manager saves as well, returns what it was given, which nobody may change afterwards.
        """
        hook_time_ns, wall_time_ns = time.monotonic_ns(), time.time_ns()
        try:
            tags = dict(metadata) if isinstance(metadata, Mapping) else {}
            if isinstance(image, np.ndarray) and not self._micromanager_saves:
                image.flags.writeable = False
            hardware = self.expected.arrive(tags.get("Axes"))
            refused = self._intake.put(
                image, tags, hardware, wall_time_ns, hook_time_ns, may_wait=self._may_wait
            )
            self._may_wait = not refused  # one stall is enough; until there is room, none waits
            if refused:
                self._refused(refused)
        except Exception as error:  # noqa: BLE001 - an exception here would abort the experiment
            self._on_trouble(f"an image could not be taken: {error!r}")
        return (image, metadata) if self._micromanager_saves else None

    def _refused(self, reason: str) -> None:
        if self._micromanager_saves:
            self._on_trouble(f"a frame is only in Micro-Manager's own storage: {reason}")
        else:
            self._on_trouble(f"a frame is lost, the acquisition is being stopped: {reason}")
            self.stopping.set()

    def _go_on(self, event: E) -> E | None:
        return None if self.closed or self.stopping.is_set() else event
