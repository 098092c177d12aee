"""Runtimes: what executes a generator on the hardware at hand. One file each, one protocol.

A runtime is opened, loaded for each shape before the first plane of that shape (this may take
seconds: a worker announces it), asked to refocus planes one by one, and closed, all from one
thread. Nothing is imported before it is chosen, so a machine needs only its own runtime.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.package import Package
from engine.scaling import Scaling
from refocus.errors import SettingsError
from refocus.frame import Pixels

Engine = Literal["auto", "openvino", "tensorrt", "none"]
"""What `--engine` may say; the same everywhere."""


@dataclass(frozen=True, slots=True)
class Refocused:
    """A runtime's answer: (y, x), dtype and counts of the raw plane."""

    pixels: Pixels
    clipped: int
    """Pixels whose value did not fit into the dtype and was cut to its limit."""


class Runtime(Protocol):
    """Executes one generator at a time."""

    @property
    def name(self) -> str:
        """Runtime, version, device and precision: "openvino 2026.4.1 CPU bf16"."""

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        """Make *package* the current generator and get ready for planes of *shape* (y, x) px.

        Cheap for a pair that is loaded already. Raises PackageError where the generator cannot
        run here.
        """

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        """Refocus one plane, (y, x), uint8 or uint16, of a loaded shape; *pixels* stay untouched.

        Raises RejectedError for pixels of another dtype, EngineError where the runtime fails or
        its answer does not pass engine/checks.py.
        """

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        """The network alone on a plane of zeros: what `refocus bench` holds the worker against."""

    def close(self) -> None:
        """Release everything; may be called twice."""


def open_runtime(engine: Engine, threads: int | None = None) -> Runtime:
    """The runtime that *engine* names; auto takes the best that this machine has.

    *threads*: how many a CPU runtime computes with; None leaves one core free.
    Raises SettingsError for an explicit choice that cannot be had: never a silent fallback.
    """
    if engine in ("auto", "openvino"):
        from engine.runtimes.openvino import OpenVino

        return OpenVino(threads)
    raise SettingsError(
        f"engine {engine!r} cannot refocus in this version of Refocus; choose auto or openvino"
    )
