"""OpenVINO on the CPU: the runtime for machines without a GPU. No torch.

The network is compiled for one static shape at a time (50 ms, measured at any size up to 3072²)
and runs over the whole frame at once. Frames are padded at the bottom and on the right, to the
generator's stride and to at least 64 px: by reflection, again and again where the pad is wider than
the frame, and by repetition where a side is a single pixel. The padding is cut off the answer.

Precision is OpenVINO's own choice for the CPU: bfloat16 where the hardware has it, which halves the
time. The last layers and the way around the network stay float32. `precision="f32"` is there to
measure against.

One core is left free and no thread is pinned: the camera's software comes first.

Importing the `openvino` wheel reports the import to Google Analytics as soon as the package
openvino-telemetry, on which it depends, is installed: it forks a process that opens a connection,
and leaves an identifier in the user's home. We make that package unimportable before we import
openvino, which then uses its own stub. tests/test_openvino.py proves it.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import psutil

from engine.checks import check_answer
from engine.package import ONNX, Package
from engine.runtimes import Answer, Refocused
from engine.scaling import Scaling, to_counts, to_network
from engine.tiles import padded_shape
from refocus.errors import EngineError, PackageError
from refocus.frame import Pixels

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: not importable
import openvino as ov  # noqa: E402

MAX_LOADED = 4
"""Compiled networks kept, the latest used: each holds its activations, 0.2 GB at 2048²."""

Key = tuple[str, tuple[int, int]]
"""Hash of a package, and padded shape (y, x)."""


class OpenVino:
    """The runtime protocol of engine/runtimes on this machine's CPU."""

    def __init__(
        self, threads: int | None = None, precision: Literal["auto", "f32"] = "auto"
    ) -> None:
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or spare_cores(),
            "ENABLE_CPU_PINNING": False,
        }
        if precision == "f32":
            self._options["INFERENCE_PRECISION_HINT"] = ov.Type.f32
        self._core = ov.Core()
        self._package: Package | None = None
        self._loaded: OrderedDict[Key, Any] = OrderedDict()

    @property
    def name(self) -> str:
        hint = self._options.get("INFERENCE_PRECISION_HINT")
        precision = hint or self._core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        return f"openvino {ov.get_version().split('-')[0]} CPU {precision.get_type_name()}"

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        self._package = package
        key = _key(package, shape)
        if key not in self._loaded:
            self._loaded[key] = self._compile(package, key[1])
        self._loaded.move_to_end(key)
        while len(self._loaded) > MAX_LOADED:
            self._loaded.popitem(last=False)

    @property
    def slots(self) -> int:
        return 1  # the cores are busy with one plane

    def start(self, pixels: Pixels, scaling: Scaling) -> Answer:
        package = self._package
        if package is None or _key(package, pixels.shape) not in self._loaded:
            raise EngineError(f"nothing is loaded for a plane of {pixels.shape}; call load first")
        request = self._loaded[_key(package, pixels.shape)]
        padded = _pad(pixels, _key(package, pixels.shape)[1])
        request.get_input_tensor().data[0, 0] = to_network(padded, scaling)
        request.start_async()

        def answer() -> Refocused:
            try:
                request.wait()
            except RuntimeError as error:
                raise EngineError(
                    f"OpenVINO failed on a plane of {pixels.shape}: {error}"
                ) from error
            height, width = pixels.shape
            # A view on OpenVINO's own memory: valid until the next start, read before we return.
            values = request.get_output_tensor().data[0, 0, :height, :width]
            check_answer(pixels, float(values.min()), float(values.max()))
            counts, clipped = to_counts(values, scaling, pixels.dtype)
            return Refocused(pixels=counts, clipped=clipped)

        return answer

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        return self.start(pixels, scaling)()

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        self.load(package, shape)
        request = self._loaded[_key(package, shape)]
        request.get_input_tensor().data[:] = 0

        def infer() -> None:
            request.infer()

        return infer

    def close(self) -> None:
        self._loaded.clear()
        self._package = None

    def _compile(self, package: Package, padded: tuple[int, int]) -> Any:
        wanted = [1, 1, *padded]
        try:
            model = self._core.read_model(package.generator)
            model.reshape(wanted)
            compiled = self._core.compile_model(model, "CPU", self._options)
            got = list(compiled.output().shape)
        except RuntimeError as error:
            raise PackageError(
                f"model package {package.folder}: OpenVINO cannot compile {ONNX} "
                f"for input {wanted}: {error}"
            ) from error
        if got != wanted:
            raise PackageError(
                f"model package {package.folder}: {ONNX} answers shape {got} "
                f"to input {wanted}; wanted the same shape"
            )
        return compiled.create_infer_request()


def spare_cores() -> int:
    """Threads that leave one physical core of those we may use to the camera's software."""
    if sys.platform == "linux":
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed) - 1)


def _key(package: Package, shape: tuple[int, int]) -> Key:
    return package.hash, padded_shape(shape, package.manifest.stride)


def _pad(pixels: Pixels, padded: tuple[int, int]) -> Pixels:
    missing = [(0, wanted - got) for wanted, got in zip(padded, pixels.shape, strict=True)]
    return np.pad(pixels, missing, mode="reflect") if any(map(any, missing)) else pixels
