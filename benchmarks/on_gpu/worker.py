"""The real worker with a runtime of the benchmark's: python worker.py KIND WORKER-ARGUMENTS."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine import worker
from engine.package import Package
from engine.runtimes import Answer, Refocused, Runtime
from engine.scaling import Scaling
from refocus.frame import Pixels

SLOTS = 2


class Echo:
    """A runtime that answers what it gets: it copies as a GPU's does, and computes nothing."""

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


def open_runtime(kind: str) -> Runtime:
    """What stands under that name in benchmarks/on_gpu/track.py."""
    if kind == "echo":
        return Echo()
    if kind == "tensorrt":
        from engine.runtimes import open_runtime

        return open_runtime("tensorrt")
    from benchmarks.on_gpu.standin import StandIn

    return StandIn(kind == "seam")


if __name__ == "__main__":

    def given(arguments: argparse.Namespace) -> Runtime:
        """Whatever runtime the worker was asked for, it gets ours."""
        return open_runtime(sys.argv[1])

    sys.exit(worker.main(sys.argv[2:], given))
