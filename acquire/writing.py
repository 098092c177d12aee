"""The writer's thread: takes what the intake holds, in order, and puts it into the run on disk.

It is the only thread that touches the run. A raw frame is acknowledged when its write and its
journal record are done. A frame that cannot be written is booked FAILED, the reason is told once,
and the thread goes on: the next frame may be writable, and the journal must hear of every one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple

from acquire.intake import Intake
from acquire.items import Answer, Arrival, Item, Plane, Refused
from refocus import status
from refocus.errors import RefocusError
from refocus.frame import RefocusOutcome
from store.writer import Provenance, RunWriter

LATENCIES = 2000
"""Hook-to-disk times kept for the percentiles, the latest ones: their sum-up takes 0.2 ms."""
NO_RAW = "no raw frame was saved"


class Writing:
    """Drains *intake* into *run* until the intake is closed.

    From this thread: *on_raw_failure(reason)* for a raw frame that could not be saved,
    *on_trouble(reason)* for anything else that went wrong.
    """

    def __init__(
        self,
        run: RunWriter,
        intake: Intake,
        on_raw_failure: Callable[[str], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._run = run
        self._intake = intake
        self._on_raw_failure = on_raw_failure
        self._on_trouble = on_trouble
        self._unsaved: set[int] = set()
        self._hook_times_ns: dict[int, int] = {}  # of frames whose refocusing has no answer yet
        self._latencies_ns: deque[int] = deque(maxlen=LATENCIES)
        self.frames = 0
        """Raw frames taken, saved or not."""
        self.first_frame_ns = 0
        self.last_frame_ns = 0
        self._thread = threading.Thread(target=self._work, name="refocus-writer")
        self._thread.start()

    def join(self) -> None:
        """Waits until all is written; the intake must have been closed."""
        self._thread.join()

    @property
    def unanswered(self) -> int:
        """Raw frames taken whose refocusing has no outcome yet."""
        return len(self._hook_times_ns)

    def latency(self) -> status.Latency | None:
        """Percentiles from the hook to the refocused plane on disk."""
        return status.latency(self._latencies_ns.copy())

    def _work(self) -> None:
        while (item := self._intake.take()) is not None:
            try:
                self._put(item)
            except Exception as error:  # noqa: BLE001 - one plane must not cost all that follow
                self._on_trouble(f"the run on disk: {_cause(error)}")

    def _put(self, item: Item) -> None:
        match item:
            case Arrival():
                self._raw(item)
            case Refused(seq=seq, reason=reason):
                self._intake.settled(item)
                self._run.book_raw_failed(seq, reason)
                self._run.book_refocus(seq, RefocusOutcome.FAILED, NO_RAW)
            case Answer():
                self._answer(item)
            case _:
                item(self._run)

    def _raw(self, arrival: Arrival) -> None:
        header = arrival.frame.header
        self._hook_times_ns[header.seq] = header.hook_time_ns
        self.frames += 1
        self.first_frame_ns = self.first_frame_ns or header.hook_time_ns
        self.last_frame_ns = header.hook_time_ns
        try:
            self._run.write_raw(arrival.frame, arrival.tags)
        except (RefocusError, OSError) as error:
            self._unsaved.add(header.seq)
            self._on_raw_failure(_cause(error))
        finally:
            self._intake.settled(arrival)

    def _answer(self, answer: Answer) -> None:
        # 0: the second answer for this frame, LATE after LOST.
        hook_time_ns = self._hook_times_ns.pop(answer.seq, 0)
        if answer.plane is None:
            self._run.book_refocus(answer.seq, answer.outcome, answer.reason)
            return
        try:
            if answer.seq in self._unsaved:
                self._run.book_refocus(answer.seq, RefocusOutcome.FAILED, NO_RAW)
            else:
                self._refocused(answer.seq, answer.plane, hook_time_ns)
        finally:
            self._intake.plane_settled()

    def _refocused(self, seq: int, plane: Plane, hook_time_ns: int) -> None:
        try:
            generator = self._run.note_generator(*astuple(plane.maker))
        except RefocusError as error:
            self._run.book_refocus(seq, RefocusOutcome.FAILED, _cause(error))
            raise
        made = Provenance(
            generator=generator,
            latency_ns=time.monotonic_ns() - hook_time_ns,
            clipped=plane.clipped,
        )
        self._run.write_refocused(seq, plane.pixels, made)
        self._latencies_ns.append(time.monotonic_ns() - hook_time_ns)


def _cause(error: Exception) -> str:
    """Why, without the frame's number and path, so that the same trouble is told once."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) if isinstance(cause, RefocusError) else repr(cause)
