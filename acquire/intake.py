"""The queues behind the hook: the trunk that may not lose a frame, the branch that may.

The hook's thread is Micro-Manager's image thread; what it costs there delays the camera. So `put`
takes no lock, makes no system call and looks at nothing but the size of the image. (A system call
gives up Python's interpreter lock, and getting it back can take 5 ms and more.) The intake's own
thread does the rest: it builds the headers, numbers the frames and hands each to both sides.

Policies, one a queue:
  trunk    every frame, in order, to the writer. Bounded in bytes; half full is said. Full: `put`
           waits up to raw_stall_ms, then the frame is booked FAILED and the hook told why.
  branch   the newest few frames, to the link. Full: the oldest leaves and is booked SKIPPED.
  again    a few frames read back from the disk, to the link while none of the branch waits. Full:
           `offer_again` says so, and whoever reads them back waits for room (acquire/again.py).
  answers  what the link says became of a frame, to the writer. Refocused planes are bounded by the
           link, which sends no frame while many wait; a raw frame always goes first.

Every counter here has one thread that writes it; together they need no lock.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from acquire import header
from acquire.header import Hardware
from acquire.items import Answer, Arrival, Exposure, Item, Note, Plane, Refused
from refocus.errors import RefocusError
from refocus.frame import Frame, RefocusOutcome

WARN_AT = 0.5
"""Share of the raw queue from which on it is said that the disk is slow."""


class Intake:
    """Hands frames from the hook's thread to the writer's and the link's.

    *on_trouble* hears, from the intake's thread, why a frame cannot be read, and that the raw queue
    is half full.
    """

    def __init__(
        self,
        run: str,
        *,
        raw_queue_bytes: int,
        raw_stall_ms: int,
        slot_frames: int,
        on_trouble: Callable[[str], None],
    ) -> None:
        self._run = run
        self._raw_queue_bytes = raw_queue_bytes
        self._raw_stall_ms = raw_stall_ms
        self._slot_frames = slot_frames
        self._on_trouble = on_trouble
        self.no_engine = ""
        """Why there is no engine; every frame is then booked SKIPPED with this reason."""
        self.ring: Callable[[], None] = lambda: None
        """Wakes the link, which sleeps in a ZeroMQ poll; the intake's thread calls it."""
        self.exposures = 0
        """Images that the hook got, taken or not (hook's thread)."""
        self.received = 0
        """Frames they became: a colour image is three (intake's thread)."""
        self.high_water_bytes = 0
        self._ended = False
        self._bytes_in = 0
        self._bytes_out = 0
        self._planes_in = 0
        self._planes_out = 0
        self._exposures: queue.SimpleQueue[Exposure | None] = queue.SimpleQueue()
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._deferred: deque[Answer] = deque()
        self._slot: deque[Frame] = deque()
        self._again: deque[Frame] = deque()
        self._thread = threading.Thread(target=self._receive, name="refocus-intake")

    def start(self) -> None:
        """Starts the intake's thread, before the first `put`; `end` ends it."""
        self._thread.start()

    # -- hook's thread ---------------------------------------------------------------------------

    def put(
        self,
        image: npt.NDArray[Any],
        metadata: Mapping[str, Any],
        hardware: Hardware,
        wall_time_ns: int,
        hook_time_ns: int,
        *,
        may_wait: bool,
    ) -> str:
        """Takes an image; returns why not, where the raw queue stayed full or the run is closed.

        A refused image is booked FAILED, except after the end: then there is no run to book it in.
        """
        if self._ended:
            return "it came after the recorder was closed"
        weight = int(getattr(image, "nbytes", 0))
        refused = ""
        if not self._has_room(weight) and not self._wait_for_room(weight, may_wait):
            weight = 0
            refused = (
                f"the raw queue of {self._raw_queue_bytes / 2**20:g} MiB stayed full, the disk "
                "does not keep up; use a faster disk, a lower rate or a larger raw_queue_mib"
            )
        self.exposures += 1
        self._bytes_in += weight
        self.high_water_bytes = max(self.high_water_bytes, self.waiting_bytes)
        self._exposures.put(
            Exposure(image, metadata, hardware, wall_time_ns, hook_time_ns, weight, refused)
        )
        return refused

    def _wait_for_room(self, nbytes: int, may_wait: bool) -> bool:
        deadline_ns = time.monotonic_ns() + self._raw_stall_ms * 1_000_000 * may_wait
        while not self._has_room(nbytes):
            if time.monotonic_ns() >= deadline_ns:
                return False
            time.sleep(0.001)
        return True

    def _has_room(self, nbytes: int) -> bool:
        # An image larger than the whole queue still has to pass, alone.
        waiting = self.waiting_bytes
        return waiting == 0 or waiting + nbytes <= self._raw_queue_bytes

    # -- the intake's own thread -----------------------------------------------------------------

    def _receive(self) -> None:
        while (exposure := self._exposures.get()) is not None:
            self._pass_on(exposure)

    def _pass_on(self, exposure: Exposure) -> None:
        frames, reason = [], exposure.refused
        if not reason:
            try:
                frames = self._frames(exposure)
            except Exception as error:  # noqa: BLE001 - a frame that cannot be read is booked
                reason = str(error) if isinstance(error, RefocusError) else repr(error)
                self._on_trouble(f"a frame cannot be read: {reason}")
        if reason:
            self._queue.put(Refused(self.received, reason, exposure.weight_bytes))
            self.received += 1
            return
        share, rest = divmod(exposure.weight_bytes, len(frames))
        for number, frame in enumerate(frames):
            weight = share if number else share + rest
            self._queue.put(Arrival(frame, exposure.metadata, weight))
            self.received += 1
            self._offer(frame)
        self.ring()
        if self.waiting_bytes > self._raw_queue_bytes * WARN_AT:
            self._on_trouble("the raw queue is half full: frames come faster than the disk writes")

    def _frames(self, exposure: Exposure) -> list[Frame]:
        planes = header.split(exposure.image, exposure.metadata, exposure.hardware)
        frames = []
        for number, (suffix, plane) in enumerate(planes.items()):
            pixels = plane.view()
            pixels.flags.writeable = False
            built = header.build(
                exposure.metadata,
                pixels,
                suffix,
                exposure.hardware,
                run=self._run,
                seq=self.received + number,
                wall_time_ns=exposure.wall_time_ns,
                hook_time_ns=exposure.hook_time_ns,
            )
            frames.append(Frame(built, pixels))
        return frames

    def _offer(self, frame: Frame) -> None:
        if self.no_engine:
            self._skip(frame, self.no_engine)
            return
        self._slot.append(frame)
        while len(self._slot) > self._slot_frames:
            try:
                oldest = self._slot.popleft()
            except IndexError:  # the link took it between the two lines
                break
            self._skip(oldest, "engine busy or absent")

    def _skip(self, frame: Frame, reason: str) -> None:
        self._queue.put(Answer(frame.header.seq, RefocusOutcome.SKIPPED, reason))

    # -- link's thread ---------------------------------------------------------------------------

    def take_newest(self) -> Frame | None:
        """The newest frame that waits, else the first that was offered again, or None."""
        with contextlib.suppress(IndexError):  # empty
            return self._slot.pop()
        with contextlib.suppress(IndexError):
            return self._again.popleft()
        return None

    def answer(self, answer: Answer) -> None:
        """Tells the writer what became of a frame's refocusing."""
        self._planes_in += answer.plane is not None
        self._queue.put(answer)

    # -- writer's thread -------------------------------------------------------------------------

    def take(self, before_waiting: Callable[[], None]) -> Item | None:
        """Blocks for the next thing to do; None: closed, and all is taken.

        *before_waiting* is called when there is nothing to do at once.

        The queue keeps the order of arrival, so the raw frame of an answer is always taken before
        it. Refocused planes wait while raw frames do: the trunk goes first.
        """
        while True:
            if self._queue.empty():
                before_waiting()
            if self._deferred and self.waiting_bytes == 0:
                return self._deferred.popleft()
            item = self._queue.get()
            if item is None and self._deferred:
                self._queue.put(None)
                return self._deferred.popleft()
            if isinstance(item, Answer) and item.plane is not None and self.waiting_bytes > 0:
                self._deferred.append(item)
                continue
            return item

    def settled(self, item: Arrival | Refused) -> None:
        """The frame has left the queue, onto the disk or failed."""
        self._bytes_out += item.weight_bytes

    def plane_settled(self, plane: Plane) -> None:
        """A refocused plane has left the queue, onto the disk or not."""
        plane.done()
        self._planes_out += 1

    # -- any thread ------------------------------------------------------------------------------

    def note(self, note: Note) -> None:
        """Runs *note* on the writer's thread, in order with the frames."""
        self._queue.put(note)

    def offer_again(self, frame: Frame) -> bool:
        """Offers a frame that is on disk to the engine; False: no room now, offer it later.

        There is room while no raw frame is on its way to the disk and few frames wait here.
        """
        if self.waiting_bytes or len(self._again) >= self._slot_frames:
            return False
        self._again.append(frame)
        self.ring()
        return True

    def withdraw(self) -> list[int]:
        """Takes back what was offered again and still waits; returns the frames' numbers."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._again.popleft().header.seq)
        return taken

    def end(self) -> None:
        """Returns when every image that was taken has been handed on; later ones are refused."""
        self._ended = True
        self._exposures.put(None)
        self._thread.join()
        with contextlib.suppress(queue.Empty):  # those whose `put` had begun before
            while (exposure := self._exposures.get_nowait()) is not None:
                self._pass_on(exposure)

    def close(self) -> None:
        """After `end` and the last `answer` and `note`: the writer gets None once all is taken."""
        self._queue.put(None)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of images between hook and disk."""
        return self._bytes_in - self._bytes_out

    @property
    def planes_waiting(self) -> int:
        """Refocused planes between link and disk; the link sends nothing while these are many."""
        return self._planes_in - self._planes_out

    @property
    def slot_waiting(self) -> int:
        """Frames that wait for the engine."""
        return len(self._slot)
