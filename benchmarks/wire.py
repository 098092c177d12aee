"""What the wire carries: python benchmarks/wire.py [--size PX] [--rounds N] [--seconds S]

A link and a worker process, both the real ones, 2048² uint16. The worker's runtime is an echo: it
copies each plane into memory of its own and back, as a GPU's runtime does, and computes nothing.
Frames wait for the link all the time, and whoever would write the planes to disk only looks at the
number stamped into them. Rounds by message and by shared memory take turns, on ipc; reported are
the medians. What a real runtime reaches through the wire is held against this (benchmarks/gpu.py).
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from acquire.header import UNKNOWN
from acquire.intake import Intake
from acquire.items import Answer as LinkAnswer
from acquire.items import Arrival
from acquire.link import Link
from engine import model_store, package, worker
from engine.package import Package
from engine.runtimes import Answer, Refocused
from engine.scaling import Scaling
from refocus import wire
from refocus.errors import EngineError
from refocus.frame import Pixels
from refocus.settings import LinkSettings, Settings

READY_S = 120.0
SLOTS = 2
WAITING = 3
"""Frames that always wait for the link."""
FRAMES = 16
"""Different ones, in memory that is warm."""
WARM_UP = 20


class Echo:
    """A runtime (engine/runtimes) that answers what it gets."""

    name = "echo"
    slots = SLOTS

    def __init__(self) -> None:
        self._buffers: list[Pixels] = []
        self._next = 0

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        self._buffers = [np.zeros(shape, np.uint16) for _ in range(SLOTS)]

    def start(self, pixels: Pixels, scaling: Scaling) -> Answer:
        buffer = self._buffers[self._next % SLOTS]
        self._next += 1
        np.copyto(buffer, pixels)
        return lambda: Refocused(buffer.view(), 0)

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        return self.start(pixels, scaling)()

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        self._buffers.clear()


def echo_rate(
    shape: tuple[int, int] = (2048, 2048), seconds: float = 3.0, *, shared_memory: bool = True
) -> float:
    """Frames/s of uint16 through the link, to an echo worker and back."""
    command = [sys.executable, str(Path(__file__).resolve()), "--echo"]
    generator = model_store.find("fluorescence")
    return wire_rate(command, generator, shape, seconds, shared_memory=shared_memory, is_echo=True)


def wire_rate(
    command: Sequence[str],
    generator: Path,
    shape: tuple[int, int],
    seconds: float,
    *,
    shared_memory: bool,
    is_echo: bool = False,
) -> float:
    """Frames/s through the link to the worker that *command* starts, and back.

    *command* is given the arguments of `python -m engine.worker`; the model package is
    *generator*. Raises EngineError where a frame is not refocused, or not echoed.
    """
    with _branch(command, generator, shared_memory) as (intake, link):
        if not link.wait_ready(READY_S):
            raise EngineError("the worker does not introduce itself; its output is above")
        camera = _Camera(intake, shape, is_echo)
        for _ in range(WARM_UP):
            camera.next_answer()
        began = time.perf_counter()
        answered = 0
        while time.perf_counter() - began < seconds:
            camera.next_answer()
            answered += 1
        return answered / (time.perf_counter() - began)


@contextmanager
def _branch(
    command: Sequence[str], generator: Path, shared_memory: bool
) -> Iterator[tuple[Intake, Link]]:
    intake = Intake(
        "bench", raw_queue_bytes=2**32, raw_stall_ms=0, slot_frames=64, on_trouble=_print
    )
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="refocus-wire-") as folder:
        link = Link(
            intake,
            Settings(link=LinkSettings(shared_memory=shared_memory)),
            {},
            address="tcp://127.0.0.1:*" if sys.platform == "win32" else f"ipc://{folder}/link",
            outside=None,
            secret=secret,
            on_ready=lambda pid: None,
            on_gone=lambda pid, reason: _print(reason),
            on_trouble=_print,
        )
        link.use(package.load(generator))
        intake.start()
        given = ["--supervised", "--address", link.address, "--model", str(generator)]
        environment = {**os.environ, wire.SECRET_VARIABLE: secret}
        process = subprocess.Popen([*command, *given], env=environment, stdin=subprocess.PIPE)
        try:
            yield intake, link
        finally:
            process.communicate(timeout=READY_S)  # it leaves when its input is closed
            intake.end()
            link.close()


class _Camera:
    """Keeps frames waiting for the link, and takes what a recorder's writer would."""

    def __init__(self, intake: Intake, shape: tuple[int, int], is_echo: bool) -> None:
        self._is_echo = is_echo
        noise = np.random.default_rng(0).poisson(400, shape).astype(np.uint16)
        self._frames = [noise.copy() for _ in range(FRAMES)]
        for number, frame in enumerate(self._frames):
            frame[0, 0] = number
        self._intake = intake
        self._exposed = 0
        self._answered = 0

    def next_answer(self) -> None:
        """Returns when one more plane has come back."""
        while True:
            while self._exposed - self._answered < SLOTS + 1 + WAITING:
                self._expose()
            item = self._intake.take(lambda: None)
            if isinstance(item, Arrival):
                self._intake.settled(item)
            elif isinstance(item, LinkAnswer):
                if item.plane is None:
                    raise EngineError(f"frame {item.seq} is {item.outcome.name}: {item.reason}")
                number = int(item.plane.pixels[0, 0])
                if self._is_echo and number != item.seq % FRAMES:
                    raise EngineError(f"frame {item.seq} came back as {number}")
                self._intake.plane_settled(item.plane)
                self._answered += 1
                return

    def _expose(self) -> None:
        metadata: dict[str, Any] = {"Axes": {"time": self._exposed}, "PixelSize_um": 0.325}
        image = self._frames[self._exposed % FRAMES]
        now_ns = time.monotonic_ns()
        if why := self._intake.put(image, metadata, UNKNOWN, 0, now_ns, may_wait=False):
            raise EngineError(why)
        self._exposed += 1


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Print the rates by message and by shared memory as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="side of the frames in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    given = parser.parse_args()
    shape = (given.size, given.size)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(given.rounds):
        for shared, measured in rates.items():
            measured.append(echo_rate(shape, given.seconds, shared_memory=shared))
    message, shared_memory = (statistics.median(rates[shared]) for shared in (False, True))
    ratios = [after / before for before, after in zip(rates[False], rates[True], strict=True)]
    figures = {
        "size_px": given.size,
        "message_fps": round(message, 1),
        "shared_memory_fps": round(shared_memory, 1),
        "ratio": round(statistics.median(ratios), 2),
        "rounds": {
            "message_fps": [round(rate, 1) for rate in rates[False]],
            "shared_memory_fps": [round(rate, 1) for rate in rates[True]],
        },
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--echo"]:
        sys.exit(worker.main(sys.argv[2:], lambda given: Echo()))
    main()
