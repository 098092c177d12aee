"""The seam to the GPU: everything that Refocus wants of NVIDIA's driver, through one of two doors.

pycuda is taken where it is installed (it has to be compiled), else cuda-bindings (wheels, Windows,
too). Both speak to the same driver and do the same; nothing of either shows through: what lives on
the GPU is an int here, and the same tests run over both. Neither is imported before `open_gpu`.

Who owns what. A `Gpu` belongs to the thread that opened it, and so does all that it made: any other
thread is refused. It holds the GPU's *primary* context, which TensorRT and torch use as well, makes
it current in its thread, and keeps a list of what it allocated, so that nothing depends on Python's
garbage collector, which may run on any thread. `close` frees what is left, after waiting for the
streams: graphs first, for they hold addresses; then device memory, pinned memory, events, streams,
the kernels, and last the context. What others made in that context (TensorRT's objects) has to go
before. A thread must not end, and a process should not, without `close`: use `with`.

An error of the driver may have broken the context for good, and with it every later call. Callers
treat each GpuError so, end the process and start a new one; only GpuMemoryError leaves all intact.
`close` still takes down what it can then, and is silent about what it cannot.

Pinned memory and device addresses are checked at each copy: a copy from memory that is not pinned
would silently wait for the GPU, and one out of bounds would corrupt what others computed.
"""

import ctypes
from collections.abc import Sequence
from typing import Final, Literal

from engine.gpu.driver import (
    LIBRARY,
    Device,
    Driver,
    GpuError,
    GpuMemoryError,
    Memory,
    NoGpuError,
)
from engine.gpu.gpu import Gpu
from refocus.words import install

__all__ = [
    "LIBRARY",
    "Device",
    "Gpu",
    "GpuError",
    "GpuMemoryError",
    "Memory",
    "NoGpuError",
    "has_driver",
    "open_gpu",
]

Seam = Literal["pycuda", "cuda-bindings"]

OLDEST: Final = (7, 5)
"""Compute capability (Turing, 2018) for which the shipped kernels are compiled."""


def open_gpu(index: int = 0, seam: Seam | None = None) -> Gpu:
    """The GPU of this number, from this thread on; *seam* insists on one of the two doors.

    Raises NoGpuError with what was looked for and what to install.
    """
    driver = _start(("pycuda", "cuda-bindings") if seam is None else (seam,))
    found = driver.count()
    if not 0 <= index < found:
        names = "; ".join(f"{i}: {driver.describe(i).name}" for i in range(found))
        raise NoGpuError(f"there is no GPU {index}; this machine has {names or 'none'}")
    device = driver.describe(index)
    if device.capability < OLDEST:
        raise NoGpuError(
            f"{device.name} has compute capability {device.capability[0]}.{device.capability[1]}; "
            f"Refocus needs {OLDEST[0]}.{OLDEST[1]} (GeForce RTX 20, Quadro RTX) or newer"
        )
    return Gpu(driver, device)


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed; it comes with the display driver."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def _start(seams: Sequence[Seam]) -> Driver:
    if not has_driver():
        raise NoGpuError(
            f"no NVIDIA GPU can be used without NVIDIA's driver ({LIBRARY}), and there is none; "
            "where this computer has such a GPU, install it: nvidia.com/drivers"
        )
    reasons = []
    for seam in seams:
        try:
            driver = _binding(seam)
            driver.start()
        except ModuleNotFoundError as error:
            reasons.append(f"{seam} is not installed ({error})")
        except (ImportError, OSError) as error:
            reasons.append(f"{seam} cannot be loaded ({error})")
        except NoGpuError as error:
            reasons.append(str(error))
        else:
            return driver
    raise NoGpuError(f"no way to an NVIDIA GPU: {'; '.join(reasons)}; {install('rtx')}")


def _binding(seam: Seam) -> Driver:
    if seam == "pycuda":
        from engine.gpu.pycuda_driver import Pycuda

        return Pycuda()
    from engine.gpu.bindings_driver import Bindings

    return Bindings()
