"""What the events of an acquisition say about the run to come: how large, and in which order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from acquire.expected import key
from store.guard import DiskGuard

PAGE_BYTES = 4096
"""A plane on disk takes whole pages."""
JOURNAL_BYTES = 4096
"""Of a frame's header, tags and records: 1 kB with the demo's devices, several with a rack full."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The frames to come."""

    frames: int
    """A colour exposure, which becomes three, counts as one: no event says what the camera is."""
    stack_planes: int
    """Planes along z that follow each other at one time point; 1 where time is the fastest."""

    def run_bytes(self, plane_bytes: int, *, refocused: bool) -> int:
        """Room on disk for all frames, each with its *refocused* twin or without."""
        pages = -(-plane_bytes // PAGE_BYTES)
        return self.frames * (pages * PAGE_BYTES * (1 + refocused) + JOURNAL_BYTES)


@dataclass(frozen=True, slots=True)
class Room:
    """Whether the run to come has room on its disk, as far as anybody knows its size."""

    guard: DiskGuard
    forecast: Forecast | None
    refocused: bool

    def require(self, plane_bytes: int | None) -> None:
        """Raises DiskError where the run does not fit; *plane_bytes* is None while unknown."""
        wanted, what = 0, "a run"
        if self.forecast is not None:
            what = f"a run of {self.forecast.frames} frames" + " and their twins" * self.refocused
            if plane_bytes is not None:
                wanted = self.forecast.run_bytes(plane_bytes, refocused=self.refocused)
        self.guard.require(wanted, what)


def forecast(events: Iterable[Mapping[str, Any]]) -> Forecast:
    """Of events as pycromanager's `multi_d_acquisition_events` makes them.

    One without axes moves the hardware and takes no image. Channels and positions that take turns
    do not end a stack: each is looked at by itself, and the longest stack counts.
    """
    frames = 0
    first_times: dict[object, str] = {}
    stacks: dict[object, int] = {}
    ended: set[object] = set()
    for event in events:
        axes = event.get("axes")
        if not axes:
            continue
        frames += 1
        series = key({name: value for name, value in axes.items() if name not in ("time", "z")})
        time = str(axes.get("time"))
        if first_times.setdefault(series, time) != time:
            ended.add(series)
        if series not in ended:
            stacks[series] = stacks.get(series, 0) + 1
    return Forecast(frames, max(stacks.values(), default=1))
