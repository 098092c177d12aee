"""The two queues behind the hook: the trunk that may not lose a frame, the branch that may.

The hook's thread is Micro-Manager's image thread; what it costs there delays the camera. So `put`
takes no lock and makes no system call: a SimpleQueue, a deque, and counters with one writing thread
each. (A system call gives up Python's interpreter lock, and getting it back can take 5 ms.)

Policies, one a queue:
  trunk   every frame, in order, to the writer. Bounded in bytes. Full: `put` waits up to
          raw_stall_ms, then reports False, and the hook stops the acquisition loudly.
  branch  the newest few frames, to the link. Full: the oldest leaves and is booked SKIPPED.
  answers what the link says became of a frame, to the writer. Refocused planes are bounded by the
          link, which sends no frame while many wait; a raw frame always goes first.

The doorbell is how the link, which sleeps in a ZeroMQ poll, learns of a new frame: a thread of its
own turns the hook's note into a byte on a socket, so that the hook makes no system call.
"""

import contextlib
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refocus.frame import Frame, Pixels, RefocusOutcome
from store.writer import RunWriter


@dataclass(frozen=True, slots=True)
class Arrival:
    """A raw frame on its way to the disk, with Micro-Manager's tags as they came."""

    frame: Frame
    tags: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """A frame that came through the hook but cannot be written, and why."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class Maker:
    """Which generator made a plane, in which runtime."""

    package_hash: str
    name: str
    version: str
    runtime: str


@dataclass(frozen=True, slots=True)
class Plane:
    """A refocused plane (y, x) and how it came about."""

    pixels: Pixels
    clipped: int
    maker: Maker


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of the refocusing of one frame; the *plane* only with REFOCUSED."""

    seq: int
    outcome: RefocusOutcome
    reason: str = ""
    plane: Plane | None = None


Note = Callable[[RunWriter], object]
"""Something else for the writer's thread to put into the run: a scaling, an event."""

Item = Arrival | Refused | Answer | Note


@dataclass
class Intake:
    """Hands frames from the hook's thread to the writer's and the link's.

    Each method names the thread that may call it. Counters have one writing thread each.
    """

    raw_queue_bytes: int
    raw_stall_ms: int
    slot_frames: int
    no_engine: str = ""
    """Why there is no engine; every frame is then booked SKIPPED at once with this reason."""

    received: int = 0
    """Frames that the hook got, taken or not (hook's thread)."""
    high_water_bytes: int = 0
    _bytes_in: int = 0
    _bytes_out: int = 0
    _planes_in: int = 0
    _planes_out: int = 0
    _queue: "queue.SimpleQueue[Item | None]" = field(default_factory=queue.SimpleQueue)
    _deferred: "deque[Answer]" = field(default_factory=deque)
    _slot: "deque[Frame]" = field(default_factory=deque)
    _bell: "queue.SimpleQueue[bool]" = field(default_factory=queue.SimpleQueue)

    def put(self, arrival: Arrival, *, may_wait: bool = True) -> bool:
        """Hook's thread. False: the raw queue stayed full for raw_stall_ms; frame refused."""
        nbytes = arrival.frame.header.nbytes
        waiting = self.waiting_bytes + nbytes
        if waiting > self.raw_queue_bytes and not self._wait_for_room(nbytes, may_wait):
            mib = self.raw_queue_bytes / 2**20
            self.refuse(arrival.frame.header.seq, f"raw queue of {mib:g} MiB full: disk too slow")
            return False
        self.received += 1
        self._bytes_in += nbytes
        self.high_water_bytes = max(self.high_water_bytes, waiting)
        self._queue.put(arrival)
        if self.no_engine:
            seq = arrival.frame.header.seq
            self._queue.put(Answer(seq, RefocusOutcome.SKIPPED, self.no_engine))
        else:
            self._offer(arrival.frame)
        return True

    def refuse(self, seq: int, reason: str) -> None:
        """Hook's thread. A frame came that cannot be written: booked FAILED, raw and refocused."""
        self.received += 1
        self._queue.put(Refused(seq, reason))

    def _wait_for_room(self, nbytes: int, may_wait: bool) -> bool:
        deadline_ns = time.monotonic_ns() + self.raw_stall_ms * 1_000_000 * may_wait
        while self.waiting_bytes + nbytes > self.raw_queue_bytes:
            if self.waiting_bytes == 0:
                return True  # one frame larger than the whole queue still has to pass
            if time.monotonic_ns() >= deadline_ns:
                return False
            time.sleep(0.001)
        return True

    def _offer(self, frame: Frame) -> None:
        self._slot.append(frame)
        while len(self._slot) > self.slot_frames:
            try:
                oldest = self._slot.popleft()
            except IndexError:  # the link took it between the two lines
                break
            skipped = Answer(oldest.header.seq, RefocusOutcome.SKIPPED, "engine busy or absent")
            self._queue.put(skipped)
        self._bell.put(True)

    def take_newest(self) -> Frame | None:
        """Link's thread. The newest waiting frame, or None."""
        try:
            return self._slot.pop()
        except IndexError:
            return None

    def answer(self, answer: Answer) -> None:
        """Link's thread. Tells the writer what became of a frame's refocusing."""
        self._planes_in += answer.plane is not None
        self._queue.put(answer)

    def note(self, note: Note) -> None:
        """Any thread. Runs *note* on the writer's thread, in order with the frames."""
        self._queue.put(note)

    def take(self) -> Item | None:
        """Writer's thread. Blocks for the next thing to do; None: closed, and all is taken.

        The queue keeps the order of arrival, so the raw frame of an answer is always taken before
        it. Refocused planes wait while raw frames do: the trunk goes first.
        """
        while True:
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

    def written(self, arrival: Arrival) -> None:
        """Writer's thread. The frame has left the queue, onto the disk or failed."""
        self._bytes_out += arrival.frame.header.nbytes

    def plane_written(self) -> None:
        """Writer's thread. A refocused plane has left the queue."""
        self._planes_out += 1

    def close(self) -> None:
        """After the last `put`, `answer` and `note`: the writer gets None once all is taken."""
        self._queue.put(None)

    def close_bell(self) -> None:
        """Any thread. Ends the doorbell's thread."""
        self._bell.put(False)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of raw frames between hook and disk."""
        return self._bytes_in - self._bytes_out

    @property
    def planes_waiting(self) -> int:
        """Refocused planes between link and disk; the link sends nothing while these are many."""
        return self._planes_in - self._planes_out

    @property
    def slot_waiting(self) -> int:
        """Frames that wait for the engine."""
        return len(self._slot)

    def start_doorbell(self, bell: socket.socket) -> threading.Thread:
        """Starts the thread that rings *bell*, one byte a new frame, until `close_bell`."""

        def ring() -> None:
            while self._bell.get():
                with contextlib.suppress(BlockingIOError):  # full: the link is awake anyway
                    bell.send(b"!")

        thread = threading.Thread(target=ring, name="refocus-doorbell")
        thread.start()
        return thread
