"""The writer's thread: takes what the intake holds, in order, and puts it into the run on disk.

It is the only thread that touches the run. While the disk takes one plane it makes the next one
ready; when nothing waits, it waits for the disk. A raw frame is acknowledged when its write and its
journal record are done. A frame that cannot be written is booked FAILED, the reason is told once,
and the thread goes on: the next frame may be writable, and the journal must hear of every one.

After every plane the disk guard is asked whether the run must stop.
"""

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple

from acquire.intake import Intake
from acquire.items import Answer, Arrival, Item, Refused
from refocus import status
from refocus.errors import RefocusError, RunError
from refocus.frame import RefocusOutcome
from store.guard import DiskGuard
from store.underway import Pending
from store.writer import Provenance, RunWriter

LATENCIES = 2000
"""Hook-to-disk times kept for the percentiles, the latest ones: their sum-up takes 0.2 ms."""
NO_RAW = "no raw frame was saved"


class Writing:
    """Drains *intake* into *run* until the intake is closed.

    From this thread: *on_raw_saved(bytes)* for a raw plane on disk, *on_raw_failure(reason)* for a
    raw frame that could not be saved, *on_full(reason)* while the disk is too full, *on_trouble(
    reason)* for anything else that went wrong.
    """

    def __init__(
        self,
        run: RunWriter,
        intake: Intake,
        guard: DiskGuard,
        *,
        on_raw_saved: Callable[[int], None],
        on_raw_failure: Callable[[str], None],
        on_full: Callable[[str], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._run = run
        self._intake = intake
        self._guard = guard
        self._on_raw_saved = on_raw_saved
        self._on_raw_failure = on_raw_failure
        self._on_full = on_full
        self._on_trouble = on_trouble
        self._unsaved: set[int] = set()
        # Of frames whose refocusing has no answer yet; 0: read back from the disk.
        self._hook_times_ns: dict[int, int] = {}
        self._latencies_ns: deque[int] = deque(maxlen=LATENCIES)
        self._under_way: deque[tuple[Pending, Callable[[RunError | None], None]]] = deque()
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
        """Frames taken, or expected again, whose refocusing has no outcome yet."""
        return len(self._hook_times_ns)

    def expect_again(self, seq: int) -> None:
        """Any thread: a frame that is on disk goes to the engine once more."""
        self._hook_times_ns[seq] = 0

    def forget(self, seq: int) -> None:
        """Any thread: a frame expected again did not go to the engine after all."""
        self._hook_times_ns.pop(seq, None)

    def latency(self) -> status.Latency | None:
        """Percentiles from the hook to the refocused plane on disk."""
        return status.latency(self._latencies_ns.copy())

    def _work(self) -> None:
        while (item := self._intake.take(self._settle)) is not None:
            with self._surviving():
                self._put(item)
            self._see_to_settled()
        self._settle()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Tell what goes wrong within."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - one plane must not cost all that follow
            self._on_trouble(f"the run on disk: {_cause(error)}")

    def _settle(self) -> None:
        """Wait until every plane that was put is acknowledged or booked FAILED."""
        with self._surviving():
            self._run.settle()
        self._see_to_settled()

    def _see_to_settled(self) -> None:
        while self._under_way and self._under_way[0][0].settled:
            pending, done = self._under_way.popleft()
            with self._surviving():
                done(pending.error)

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
            pending = self._run.put_raw(arrival.frame, arrival.tags)
        except RunError as error:
            self._raw_done(arrival, error)
        else:
            self._under_way.append((pending, functools.partial(self._raw_done, arrival)))

    def _raw_done(self, arrival: Arrival, error: RunError | None) -> None:
        try:
            if error:
                self._unsaved.add(arrival.frame.header.seq)
                self._on_raw_failure(_cause(error))
            else:
                self._on_raw_saved(arrival.frame.pixels.nbytes)
        finally:
            self._intake.settled(arrival)
        self._watch_disk(arrival.frame.pixels.nbytes)

    def _answer(self, answer: Answer) -> None:
        if answer.plane is not None and any(p.seq == answer.seq for p, _ in self._under_way):
            self._settle()
        try:
            if answer.plane is not None and answer.seq in self._unsaved:
                self._run.book_refocus(answer.seq, RefocusOutcome.FAILED, NO_RAW)
            else:
                self._book(answer, self._generator(answer))
        finally:
            # Last, so that what has an outcome is in the journal. LATE comes after LOST, which has
            # settled the frame: if it is expected again by now, that is still to come.
            if answer.outcome is not RefocusOutcome.LATE:
                self._hook_times_ns.pop(answer.seq, None)
            if answer.plane is not None:
                self._intake.plane_settled(answer.plane)

    def _generator(self, answer: Answer) -> int:
        """Number in the run of the generator that gave the answer, 0 where none did."""
        if answer.maker is None:
            return 0
        try:
            return self._run.note_generator(*astuple(answer.maker))
        except RefocusError as error:
            self._run.book_refocus(answer.seq, RefocusOutcome.FAILED, _cause(error))
            raise

    def _book(self, answer: Answer, generator: int) -> None:
        if answer.plane is None:
            self._run.book_refocus(answer.seq, answer.outcome, answer.reason, generator=generator)
            return
        hook_time_ns = self._hook_times_ns.get(answer.seq, 0)
        made = Provenance(
            generator=generator,
            latency_ns=time.monotonic_ns() - hook_time_ns if hook_time_ns else 0,
            clipped=answer.plane.clipped,
        )
        self._run.write_refocused(answer.seq, answer.plane.pixels, made)
        if hook_time_ns:
            self._latencies_ns.append(time.monotonic_ns() - hook_time_ns)
        self._watch_disk(answer.plane.pixels.nbytes)

    def _watch_disk(self, nbytes: int) -> None:
        if reason := self._guard.wrote(nbytes):
            self._on_full(reason)
        if self._run.sync_trouble:
            self._on_raw_failure(f"the disk fails: {self._run.sync_trouble}")


def _cause(error: Exception) -> str:
    """Why, without the frame's number and path, so that the same trouble is told once."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) if isinstance(cause, RefocusError) else repr(cause)
