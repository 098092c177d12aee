"""A process that writes a run for readers: planes of several shapes and types, raw and refocused.

They come in no order and with gaps; pixels are known from a frame's seq. The process then does as
it is told: it waits, seals the run, or writes on until it is killed.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from store_runs import frame, pixels, start

from refocus.frame import Frame, Pixels, RefocusOutcome
from store.writer import Provenance

FORMS = {
    "stack": ((61, 53), "uint16"),
    "float": ((41, 50), "float32"),
    "page": ((64, 32), "uint16"),
    "lapse": ((24, 37), "uint8"),
    "large": ((1031, 517), "uint16"),
    "on": ((100, 150), "uint16"),
}
"""Shape and type of a plane by position: 6466, 8200, 4096, 888, 1,066,054 and 30,000 bytes.

Most are no whole pages; the large ones pass by the page cache where the disk allows it.
"""
GRID = [(t, c, z) for t in (0, 1, 2, 4) for c in ("DAPI", "GFP") for z in (0, 1, 2)]
LAPSE = (0, 1, 3, 130, 255, 256)
"""Times of the position without z and channel: they do not fit into one shard."""
BLACK = (7, 41)
"""Frames that are black, and so are their twins."""
TWIN = 1_000_000
"""A refocused plane has the pixels of this seq further on."""
LAG = 3
"""A twin is written so many frames later."""
Slot = tuple[int, ...]
"""Indices along t, c, z."""


class Taken(NamedTuple):
    """One frame."""

    seq: int
    position: str
    axes: dict[str, int | str]

    @property
    def has_twin(self) -> bool:
        return self.seq % 4 != 0

    def picture(self, *, twin: bool = False) -> Pixels:
        shape, dtype = FORMS[self.position]
        if self.seq in BLACK:
            return np.zeros(shape, dtype)
        return pixels(self.seq + TWIN * twin, shape, dtype)


def plan() -> list[Taken]:
    """Three in four slots of each stack, and two time lapses, in no order."""
    chance = random.Random(3)
    places: list[tuple[str, dict[str, int | str]]] = [("lapse", {"time": t}) for t in LAPSE]
    places += [("large", {"time": t}) for t in (0, 1, 3)]
    for position in ("stack", "float", "page"):
        for t, c, z in chance.sample(GRID, 18):
            places.append((position, {"time": t, "channel": c, "z": z}))
    chance.shuffle(places)
    return [Taken(seq, *place) for seq, place in enumerate(places)]


PLANNED = plan()


def further(seq: int) -> Taken:
    """The frames after the plan: a time lapse without an end."""
    return Taken(seq, "on", {"time": seq - len(PLANNED)})


def write(path: Path) -> None:
    """The child's work: the plan, each further frame announced, or the seal, as it is told."""
    run = start(path)
    made = Provenance(generator=run.note_generator("hash", "name", "1", "numpy"), latency_ns=1)
    waiting: list[Taken] = []

    def answer() -> None:
        taken = waiting.pop(0)
        if taken.has_twin:
            run.put_refocused(taken.seq, taken.picture(twin=True), made)
        else:
            run.book_refocus(taken.seq, RefocusOutcome.SKIPPED, "the engine was busy")

    def take(taken: Taken) -> None:
        axes = taken.axes | {"position": taken.position}
        header = frame(taken.seq, axes, *FORMS[taken.position]).header
        run.put_raw(Frame(header, taken.picture()), {})
        waiting.append(taken)
        if len(waiting) > LAG:
            answer()

    for taken in PLANNED:
        take(taken)
    while waiting:
        answer()
    run.settle()
    os.write(1, b"written\n")
    order = sys.stdin.readline()
    if order == "seal\n":
        run.close(complete=True, expected_frames=len(PLANNED))
        os.write(1, b"sealed\n")
    seq = len(PLANNED)
    while order == "go on\n":
        take(further(seq))
        run.settle()
        os.write(1, f"{seq}\n".encode())
        seq += 1


class Writer:
    """A process that has written the plan, and lives until it is killed."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, __file__, str(path)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        try:
            assert self.hear() == "written\n"
        except BaseException:
            self.kill()
            raise

    def tell(self, order: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{order}\n")
        self._child.stdin.flush()

    def hear(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline()

    def kill(self) -> list[str]:
        """Kill -9; returns the lines not heard yet."""
        self._child.kill()
        said, _ = self._child.communicate()
        return [line for line in said.splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
