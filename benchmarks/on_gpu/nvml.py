"""How busy a GPU is and what it has given out, as its driver counts it; no context is made."""

import ctypes
import sys
import threading
from types import TracebackType
from typing import Self

from refocus.errors import EngineError

EVERY_S = 0.05


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class Nvml:
    """GPU *uuid*, as NVML sees it. Raises EngineError where there is no NVML or no such GPU."""

    def __init__(self, uuid: str) -> None:
        name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
        try:
            self._nvml = ctypes.CDLL(name)
        except OSError as error:
            raise EngineError(f"no {name}: {error}") from error
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))

    def busy_percent(self) -> int:
        """Share of the last moments in which a kernel was in work."""
        seen = _Utilization()
        self._call("nvmlDeviceGetUtilizationRates", self._device, ctypes.byref(seen))
        return int(seen.gpu)

    def used_mib(self) -> float:
        """Memory given out, by all programs."""
        seen = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(seen))
        return float(seen.used) / 2**20

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._nvml, function)(*arguments):
            raise EngineError(f"{function} answers {code}")


class Watch:
    """Samples how busy the GPU is, while it is entered."""

    def __init__(self, nvml: Nvml) -> None:
        self.busy_percent: list[int] = []
        self._nvml = nvml
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refocus-nvml")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self.busy_percent.append(self._nvml.busy_percent())
