"""Ctrl-C while a run is being closed: noted, obeyed by hurrying, raised at the end."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[threading.Event]:
    """Inside, Ctrl-C sets the yielded event; KeyboardInterrupt is raised on leaving.

    A third one interrupts at once after all (people press twice): a disk may hang for ever. Does
    nothing outside the main thread, or where somebody else handles SIGINT.
    """
    hurry = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield hurry
        return

    def note(number: int, frame: FrameType | None) -> None:
        if hurry.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not under the event's lock: the main thread, which runs this handler, never waits on it.
        hurry.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield hurry
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hurry.is_set():
        raise KeyboardInterrupt
