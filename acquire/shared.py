"""Frames and answers of one worker that lie in memory which it shares with the link.

A slot goes round: the link writes a frame into it and names it in the FRAME; the worker reads it,
writes the answer in its place and says RESULT; the writer puts the plane on disk as it lies there,
and gives the slot back. Who has no slot, because none is free or the worker has not opened the
memory, goes in the message: so nothing ever waits here.

Each introduction of a worker has memory of its own. A worker that was given up may go on writing
into it, and reaches nothing that a later one uses.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable

import numpy as np

from refocus import wire
from refocus.arena import Arena
from refocus.errors import WireError
from refocus.frame import Pixels

log = logging.getLogger(__name__)


class _Slots:
    """An arena and who has which slot of it."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.free = deque(range(arena.slots))  # the writer's thread appends, the link's takes
        self.is_open = False
        """The worker has opened it too."""


class SharedPixels:
    """Up to *wanted* slots, 0: nothing is shared. The link's thread, but for giving a slot back."""

    def __init__(self, wanted: int = 0) -> None:
        self._wanted = wanted
        self._slots: _Slots | None = None
        self._given: dict[int, tuple[_Slots, int]] = {}

    def offer(self, epoch: str, nbytes: int) -> wire.Offer | None:
        """What the worker has to be told of first: memory for planes of *nbytes*, made just now."""
        if not self._wanted or nbytes > wire.MAX_PIXEL_BYTES:
            return None
        if self._slots and nbytes <= self._slots.arena.slot_bytes:
            return None
        self.close()
        try:
            arena = Arena.make(self._wanted, nbytes)
        except OSError as error:
            log.warning("pixels go to the worker in messages, which is slower: %s", error)
            self._wanted = 0
            return None
        self._slots = _Slots(arena)
        return wire.Offer(
            epoch=epoch, name=arena.name, slots=arena.slots, slot_bytes=arena.slot_bytes
        )

    def taken(self, message: wire.Taken) -> None:
        """The worker has opened what was offered, or could not."""
        if self._slots is None or message.name != self._slots.arena.name:
            return  # offered before, and too small by now
        if message.trouble:
            log.warning("pixels go to the worker in messages: %s", message.trouble)
            self._wanted = 0
            self.close()
        else:
            self._slots.is_open = True

    def put(self, seq: int, pixels: Pixels) -> int | None:
        """Write a frame into a slot and return its number; None: it has to go in the message."""
        slots = self._slots
        if slots is None or not slots.is_open or not slots.free:
            return None
        if pixels.nbytes > slots.arena.slot_bytes:
            return None
        slot = slots.free.popleft()
        self._given[seq] = slots, slot
        shape = (pixels.shape[0], pixels.shape[1])
        np.copyto(slots.arena.plane(slot, shape, str(pixels.dtype)), pixels)
        return slot

    def take(self, result: wire.Result, pixels: Pixels | None) -> tuple[Pixels, Callable[[], None]]:
        """The answer's plane, read-only, and what to call when nobody needs it any more.

        Raises WireError for an answer that does not lie where its frame did.
        """
        slots, slot = self._given.get(result.seq, (None, None))
        if result.place != slot:
            raise WireError(
                f"the answer for frame {result.seq} is said to lie in slot {result.place}, "
                f"its frame was in {slot}"
            )
        if pixels is None:
            assert slots is not None
            assert slot is not None
            pixels = slots.arena.plane(slot, result.shape, result.dtype)
            pixels.flags.writeable = False
            del self._given[result.seq]
            return pixels, functools.partial(slots.free.append, slot)
        return pixels, _nothing

    def drop(self, seq: int) -> None:
        """The frame has no answer: its slot is free."""
        slots, slot = self._given.pop(seq, (None, None))
        if slots is not None and slot is not None:
            slots.free.append(slot)

    def close(self) -> None:
        """Nobody can open the memory any more; planes that lie in it stay readable."""
        if self._slots is not None:
            self._slots.arena.remove()
            self._slots = None


def _nothing() -> None:
    pass
