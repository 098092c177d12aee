"""What the seam needs of a binding to NVIDIA's driver, and the errors that it speaks.

A binding (pycuda_driver.py, bindings_driver.py) is thin: one method a call, everything on the GPU
named by an int, no check and no book-keeping beyond what its library forces on it. Who owns what is
the seam's business (__init__.py).
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from refocus.errors import EngineError, SettingsError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""NVIDIA's driver as a program sees it. It comes with the display driver, never with a package."""

Bytes = npt.NDArray[np.uint8]


class GpuError(EngineError):
    """The driver reports a failure, or was about to be misused.

    The process' context on the GPU is not to be trusted afterwards: the process should end.
    """


class GpuMemoryError(GpuError):
    """The GPU is out of memory. Nothing is broken; smaller tiles may help."""


class NoGpuError(SettingsError):
    """There is no driver, no GPU, or no way to it; the text says what to install."""


class Memory(NamedTuple):
    """Of the whole GPU, other programs' share included."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    index: int
    name: str
    capability: tuple[int, int]
    """Compute capability: (8, 9) for Ada."""
    memory_bytes: int
    uuid: str
    """As nvidia-smi writes it: GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx."""
    driver: str
    """What the driver offers and, where NVML tells, its own version: "CUDA 13.0, driver 580.95"."""


class Driver(Protocol):
    """A binding; its methods raise GpuError or GpuMemoryError with the driver's own words."""

    name: str
    """The library and its version: "pycuda 2026.1"."""

    def start(self) -> None:
        """Raises NoGpuError where the driver is missing or finds nothing."""

    def count(self) -> int: ...
    def describe(self, index: int) -> Device: ...

    def enter(self, index: int) -> None:
        """Retain the primary context of a GPU and make it current in this thread."""

    def leave(self) -> None:
        """Undo `enter`."""

    def memory(self) -> Memory: ...
    def alloc(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def pin(self, nbytes: int, write_combined: bool) -> Bytes: ...
    def unpin(self, address: int) -> None: ...

    def make_stream(self) -> int: ...
    def drop_stream(self, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...

    def make_event(self) -> int: ...
    def drop_event(self, event: int) -> None: ...
    def record(self, event: int, stream: int) -> None: ...
    def is_done(self, event: int) -> bool: ...
    def wait(self, event: int) -> None: ...
    def elapsed_ms(self, start: int, end: int) -> float: ...

    def copy_in(self, address: int, array: npt.NDArray[Any], stream: int) -> None: ...
    def copy_out(self, array: npt.NDArray[Any], address: int, stream: int) -> None: ...

    def load(self, ptx: bytes) -> int: ...
    def unload(self, module: int) -> None: ...
    def kernel(self, module: int, name: str) -> int: ...
    def launch(
        self,
        kernel: int,
        blocks: tuple[int, int],
        threads: int,
        arguments: Sequence[np.generic],
        stream: int,
    ) -> None: ...

    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> int:
        """What was captured. Ends the capture of the stream whatever happens."""

    def drop_captured(self, captured: int) -> None: ...
    def instantiate(self, captured: int) -> int:
        """A graph to replay; what was captured can go."""

    def replay(self, graph: int, stream: int) -> None: ...
    def drop_graph(self, graph: int) -> None: ...


def driver_words(cuda: int) -> str:
    """`Device.driver`, from cuDriverGetVersion's answer (13000 is CUDA 13.0)."""
    words = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    version = _nvml_version()
    return f"{words}, driver {version}" if version else words


def uuid_words(raw: bytes) -> str:
    """`Device.uuid`, from its 16 bytes."""
    text = raw.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _nvml_version() -> str:
    """Version of the display driver; empty where NVML, which comes with it, is not installed."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return ""
    if nvml.nvmlInit_v2():
        return ""
    try:
        text = ctypes.create_string_buffer(80)
        failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        return "" if failed else text.value.decode()
    finally:
        nvml.nvmlShutdown()
