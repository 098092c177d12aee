"""Runtimes: what executes a generator on the hardware at hand. One file each, one protocol.

A runtime is opened, loaded for each shape before the first plane of that shape (this may take
seconds: a worker announces it), given planes, asked for their answers in the same order, and
closed, all from one thread. One with several slots takes the next plane while the last is in work,
so that copies hide behind computing. Nothing is imported before it is chosen, so a machine needs
only its own runtime.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.package import Package
from engine.scaling import Scaling
from refocus.errors import EngineError, SettingsError
from refocus.frame import Pixels
from refocus.words import install

Engine = Literal["auto", "openvino", "tensorrt", "none"]
"""What `--engine` may say; the same everywhere."""


@dataclass(frozen=True, slots=True)
class Refocused:
    """A runtime's answer: (y, x), dtype and counts of the raw plane."""

    pixels: Pixels
    """May lie in the runtime's own memory, where it was asked for by `start`: then it is valid
    until the next `start`, and no copy is made that nobody needs."""
    clipped: int
    """Pixels whose value did not fit into the dtype and was cut to its limit."""


Answer = Callable[[], Refocused]
"""Waits for a plane that was started; to be called once, oldest plane first.

Raises EngineError where the runtime fails or its answer does not pass engine/checks.py.
"""


class Runtime(Protocol):
    """Executes one generator at a time."""

    @property
    def name(self) -> str:
        """Runtime, version, device and precision: "openvino 2026.4.1 CPU bf16"."""

    @property
    def slots(self) -> int:
        """Planes that may be started and not yet answered."""

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        """Make *package* the current generator and get ready for planes of *shape* (y, x) px.

        Cheap for a pair that is loaded already. Raises PackageError where the generator cannot
        run here.
        """

    def start(self, pixels: Pixels, scaling: Scaling) -> Answer:
        """Begin to refocus a plane, (y, x), uint8 or uint16, of a loaded shape.

        *pixels* stay untouched, and must stay as they are until the answer is there. Raises
        RejectedError for pixels of another dtype, EngineError where the runtime fails.
        """

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        """Start one plane and wait for its answer, whose pixels are the caller's."""

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        """The network alone on a plane of zeros: what `refocus bench` holds the worker against."""

    def close(self) -> None:
        """Release everything; may be called twice."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An opened runtime, and in one line why this one."""

    runtime: Runtime
    why: str


def choose(
    engine: Engine,
    threads: int | None = None,
    device: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Open the runtime that *engine* names; auto takes the GPU where there is one, else the CPU.

    *threads*: how many a CPU runtime computes with; None leaves one core free. *device*: which GPU.
    *say* hears of long steps (plans). Raises SettingsError for an explicit choice that cannot be
    had, EngineError where it is there and does not work: never a silent fallback.
    """
    match engine:
        case "openvino":
            return Choice(_open_openvino(threads), "openvino, as the settings say")
        case "tensorrt":
            return Choice(_open_tensorrt(device, say), "tensorrt, as the settings say")
        case "auto":
            try:
                runtime = _open_tensorrt(device, say)
            except (SettingsError, EngineError) as error:
                return Choice(_open_openvino(threads), f"auto takes the CPU: {error}")
            return Choice(runtime, "auto takes the GPU")
    raise SettingsError(f"engine {engine!r} refocuses nothing; choose auto, tensorrt or openvino")


def open_runtime(engine: Engine, threads: int | None = None, device: int = 0) -> Runtime:
    """`choose`, without the reason."""
    return choose(engine, threads, device).runtime


def _open_openvino(threads: int | None) -> Runtime:
    from engine.runtimes.openvino import OpenVino

    return OpenVino(threads)


def _open_tensorrt(device: int, say: Callable[[str], None]) -> Runtime:
    try:
        from engine.runtimes.tensorrt import TensorRt
    except ImportError as error:
        raise SettingsError(f"TensorRT cannot be used: {error}; {install('rtx')}") from error
    return TensorRt(device, say=say)
