"""TensorRT's part in tests without a GPU: the package's own float32 master, in the fake driver.

Plans are real, built by TensorRT for RTX, which needs no GPU for that. To execute one takes a GPU,
so here the network is run by OpenVINO, in the order and at the moment at which the fake driver gets
to it: work in a stream that nobody waits for is not done.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.package import Package
from engine.plan import Toolkit
from engine.runtimes.openvino import ov
from refocus.errors import EngineError
from tests import fake_driver

Values = npt.NDArray[np.float32]
SCRATCH_BYTES = 4096
CAPTURE = 2
"""The first run is plain, the second one is captured."""


class Played:
    """What TensorRT is told to do, and what was asked of it."""

    def __init__(self, compute: Callable[[Values], Values], scratch_bytes_per_px: int = 0) -> None:
        self.compute = compute
        self.scratch_bytes_per_px = scratch_bytes_per_px
        self.plans: list[bytes] = []
        self.opened: list[PlayedExecutable] = []
        self.is_capturable = True
        self.refuses_capture = False
        """What a driver may do although TensorRT says that it can be captured."""
        self.open_fails: list[Exception] = []
        self.save_fails: Exception | None = None

    def open(self, toolkit: Toolkit, plan: bytes, jit_cache: Path) -> "PlayedExecutable":
        """As `engine.runtimes.executable.Executable` is called."""
        self.plans.append(plan)
        if self.open_fails:
            raise self.open_fails.pop(0)
        self.opened.append(PlayedExecutable(self))
        return self.opened[-1]

    @property
    def contexts(self) -> int:
        """Contexts that are open."""
        return sum(executable.contexts for executable in self.opened)

    @property
    def is_closed(self) -> bool:
        return all(executable.is_closed for executable in self.opened)


class PlayedExecutable:
    """Stands in for `engine.runtimes.executable.Executable`."""

    def __init__(self, played: Played) -> None:
        self.played = played
        self.contexts = 0
        self.is_closed = False

    def context(self, padded: tuple[int, int], stream: int) -> "PlayedContext":
        assert not self.is_closed
        self.contexts += 1
        return PlayedContext(self, padded)

    def save_jit(self) -> None:
        if self.played.save_fails:
            raise self.played.save_fails

    def close(self) -> None:
        assert not self.contexts, "an engine must outlive its contexts"
        self.is_closed = True


class PlayedContext:
    """One context; reads and writes the fake GPU's memory, which is the host's."""

    def __init__(self, executable: PlayedExecutable, padded: tuple[int, int]) -> None:
        self._executable = executable
        self._played = played = executable.played
        self._padded = padded
        self.memory_bytes = SCRATCH_BYTES + played.scratch_bytes_per_px * padded[0] * padded[1]
        self._bound: tuple[int, int, int] | None = None
        self._enqueued = 0

    def bind(self, network: int, answer: int, memory: int) -> None:
        self._bound = network, answer, memory

    def enqueue(self, stream: int) -> None:
        assert self._bound, "enqueued without memory"
        self._enqueued += 1
        if self._played.refuses_capture and self._enqueued == CAPTURE:
            raise EngineError("TensorRT cannot run: not while a graph is captured")
        source, target, memory = self._bound

        def run() -> None:
            scratch = (ctypes.c_uint8 * self.memory_bytes).from_address(memory)
            scratch[0] = scratch[self.memory_bytes - 1] = 1  # ours to the last byte
            self._at(target)[:] = self._played.compute(self._at(source))

        try:
            fake_driver.enqueue(stream, run)
        except AssertionError as error:  # the driver would not have it
            raise EngineError(f"TensorRT cannot run: {error}") from error

    def is_capturable(self, stream: int) -> bool:
        return self._played.is_capturable

    def close(self) -> None:
        self._executable.contexts -= 1

    def _at(self, address: int) -> Values:
        size = self._padded[0] * self._padded[1]
        array: Any = (ctypes.c_float * size).from_address(address)
        return np.frombuffer(array, np.float32).reshape(self._padded)


def master(package: Package) -> Callable[[Values], Values]:
    """What the float32 master of *package* makes of a plane in network range, (y, x)."""
    core = ov.Core()
    options = {"INFERENCE_PRECISION_HINT": ov.Type.f32, "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(core.read_model(package.generator), "CPU", options)

    def compute(values: Values) -> Values:
        answer: Any = model([values[None, None]])[0]
        plane: Values = answer[0, 0]
        return plane

    return compute
