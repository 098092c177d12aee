"""The branch alone for tests: intake, link, a real worker; the test plays the writer."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from acquire.engine_side import EngineSide, start_engine
from acquire.header import UNKNOWN
from acquire.intake import Intake
from acquire.items import Answer, Arrival
from engine.package import Package
from refocus import wire
from refocus.frame import Pixels
from refocus.settings import ChannelSettings, EngineSettings, LinkSettings, Settings

SHAPE = (64, 96)
RNG = np.random.default_rng(1)


def settings(package: Package, *, shared_memory: bool = True, **engine: int) -> Settings:
    return Settings(
        channels={"trans": ChannelSettings(modality="phase")},
        engine=EngineSettings(runtime="openvino", generator=str(package.folder), **engine),
        link=LinkSettings(beat_ms=100, shared_memory=shared_memory),
    )


class Branch:
    """The branch alone: an intake, an engine, and the writer's place taken by the test."""

    def __init__(self, chosen: Settings, folder: Path) -> None:
        (folder / "journal").mkdir(parents=True)
        self.trouble: list[str] = []
        self.intake = Intake(
            "r",
            raw_queue_bytes=2**30,
            raw_stall_ms=0,
            slot_frames=4,
            on_trouble=self.trouble.append,
        )
        self.intake.start()
        started = start_engine(chosen, self.intake, folder, None, self.trouble.append)
        assert started is not None
        self.engine: EngineSide = started
        self.answers: dict[int, list[Answer]] = {}
        self.pixels: dict[int, Pixels] = {}
        self.seq = 0

    def send(
        self, pixels: Pixels | None = None, channel: str = "DAPI", pixel_um: float = 0.3
    ) -> int:
        if pixels is None:
            pixels = RNG.integers(100, 4000, SHAPE, dtype=np.uint16)
        self.pixels[self.seq] = pixels
        metadata = {"Axes": {"time": self.seq, "channel": channel}, "PixelSize_um": pixel_um}
        assert not self.intake.put(
            pixels, metadata, UNKNOWN, 0, time.monotonic_ns(), may_wait=False
        )
        self.seq += 1
        return self.seq - 1

    def drain(self, done: Callable[[], bool], limit_s: float = 20.0) -> None:
        """Plays the writer until *done*."""
        deadline = time.monotonic() + limit_s
        while not done():
            assert time.monotonic() < deadline, (self.outcomes(), self.trouble)
            while not self.intake._queue.empty():
                self._take()
            time.sleep(0.005)

    def _take(self) -> None:
        item = self.intake.take(lambda: None)
        if isinstance(item, Arrival):
            self.intake.settled(item)
        elif isinstance(item, Answer):
            if (plane := item.plane) is not None:
                item = replace(item, plane=replace(plane, pixels=plane.pixels.copy()))
                self.intake.plane_settled(plane)
            self.answers.setdefault(item.seq, []).append(item)

    def answered(self, *seqs: int) -> Callable[[], bool]:
        return lambda: all(seq in self.answers for seq in seqs)

    def outcomes(self) -> Counter[str]:
        return Counter(given[-1].outcome.name for given in self.answers.values())

    @property
    def pid(self) -> int | None:
        """Process id of the first worker, None while there is none."""
        return next(iter(self.engine.pids), None)

    def ready(self) -> int:
        """Waits for a worker and returns its process id."""
        self.drain(lambda: self.engine.link.wait_ready(0.01) and self.pid is not None)
        assert self.pid is not None
        return self.pid

    def close(self) -> None:
        self.intake.end()
        self.engine.close()
        self.intake.close()
        self.drain(lambda: set(self.answers) == set(range(self.seq)))


def hello_of(b: Branch, epoch: str) -> wire.Hello:
    """A worker that the test plays itself."""
    assert b.engine.package is not None
    return wire.Hello(
        epoch=epoch,
        secret=b.engine._secret,
        pid=2**22 + 1,  # no process of ours: the supervisor leaves it alone
        model=b.engine.package.hash,
        runtime="test",
        credit=8,  # more than the real worker's, so that frames come here first
    )
