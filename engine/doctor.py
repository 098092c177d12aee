"""What this computer can refocus with, and what is missing: `refocus doctor`.

Every look at a driver or at a library that loads one is taken in a process of its own, with a time
limit: a broken driver crashes or hangs whoever calls it, and here that is a finding like any other.
So nothing here can harm the process that asks, which may be one that records. `auto` and an
explicit choice are answered by the very code that a worker opens its runtime with.

The GPU is found through the driver's own library, which needs nothing of ours: a computer with a
GPU and a bare installation is told what to add.
"""

import contextlib
import ctypes
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast

import msgspec

from engine.gpu import Seam, open_gpu
from engine.gpu.driver import LIBRARY, driver_words
from engine.runtimes import Engine, choose
from refocus.errors import EngineError, RefocusError, SettingsError
from refocus.words import install

if TYPE_CHECKING:
    from engine.plan import ToolkitName

LIMIT_S = 60.0
"""A driver that has to compile its kernels anew takes seconds; one that is broken, for ever."""
KILLED_S = 5.0
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities that TensorRT for RTX 1.7 builds for."""
RTX_DRIVER = (13, 0)
"""CUDA level that the packages of TensorRT for RTX 1.7 need: driver 580 or later."""
INSTALL_RTX = install("rtx")
INSTALL_TENSORRT = install("tensorrt")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute


class GpuFound(msgspec.Struct, frozen=True, kw_only=True):
    """One NVIDIA GPU."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_mib: int


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one part."""

    found: bool
    text: str
    """One line: what there is, or why there is nothing."""
    gpus: list[GpuFound] = []
    cuda: tuple[int, int] | None = None
    """Highest CUDA level of the driver."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `refocus doctor` prints."""

    findings: dict[str, Finding]
    """By part; the keys of PARTS but "auto"."""
    can_refocus: bool
    auto: Finding
    """What `auto` picks and why, or why it picks nothing."""
    advice: list[str]
    """What to install, or that nothing has to be; a line each."""


def examine(limit_s: float = LIMIT_S) -> Report:
    """Looks at every part of this computer; takes at most *limit_s* and a few seconds."""
    children = {part: _start(part) for part in PARTS}
    deadline = time.monotonic() + limit_s
    findings = {part: _finish(child, deadline) for part, child in children.items()}
    advice = advise(findings)
    auto = findings.pop("auto")
    return Report(
        findings=findings,
        can_refocus=auto.found or findings["OpenVINO, CPU"].found,
        auto=auto,
        advice=advice,
    )


def require(engine: Engine, device: int = 0, limit_s: float = LIMIT_S) -> None:
    """Raises SettingsError where *engine*, tensorrt or openvino, cannot be had on GPU *device*."""
    finding = _finish(_start(engine, device), time.monotonic() + limit_s)
    if not finding.found:
        raise SettingsError(
            f"engine {engine!r} cannot be had: {finding.text} (`refocus doctor` says more; auto "
            "takes what works)"
        )


def advise(findings: dict[str, Finding]) -> list[str]:
    """What to do about *findings* of all PARTS, in the order in which to do it."""
    if not findings["OpenVINO, CPU"].found:
        mend = ["to refocus on the CPU: pip install --force-reinstall openvino"]
    elif not findings["auto"].found:
        mend = ['until that is mended: --engine openvino, or [engine] runtime = "openvino"']
    else:
        mend = []
    return mend + _advise_gpu(findings) or ["nothing has to be installed"]


def _advise_gpu(findings: dict[str, Finding]) -> list[str]:
    gpu = findings["NVIDIA GPU"]
    if not gpu.gpus:
        return [
            "for a GPU: where this computer has one by NVIDIA, install its driver "
            "(https://www.nvidia.com/drivers) and run refocus doctor again"
        ]
    rtx = gpu.gpus[0].capability in RTX_CAPABILITIES
    extra = INSTALL_RTX if rtx else INSTALL_TENSORRT
    lines = []
    if gpu.cuda is not None and gpu.cuda < RTX_DRIVER:
        lines.append(
            "update the NVIDIA driver to 580 or later (https://www.nvidia.com/drivers): this one "
            f"knows CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, wanted is {RTX_DRIVER[0]}.{RTX_DRIVER[1]}"
        )
    usable = ("TensorRT", "TensorRT-RTX") if rtx else ("TensorRT",)
    if not any(findings[part].found for part in usable):
        lines.append(f"to use {gpu.gpus[0].name}: {extra}")
    elif not any(findings[part].found for part in ("pycuda", "cuda-bindings")):
        lines.append(f"to reach {gpu.gpus[0].name}: {extra} (it brings cuda-bindings)")
    return lines


def _gpu() -> Finding:
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return Finding(found=False, text=f"none: no NVIDIA driver is installed ({LIBRARY})")
    try:
        _call(driver, "cuInit", 0)
        level = _number(driver, "cuDriverGetVersion")
        gpus = [_gpu_at(driver, index) for index in range(_number(driver, "cuDeviceGetCount"))]
    except EngineError as error:
        return Finding(found=False, text=f"none: the NVIDIA driver answers {error}")
    cuda = (level // 1000, level % 1000 // 10)
    names = "; ".join(
        f"{gpu.index}: {gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"{gpu.memory_mib} MiB"
        for gpu in gpus
    )
    text = f"{names or 'none'} ({driver_words(level)})"
    return Finding(found=bool(gpus), text=text, gpus=gpus, cuda=cuda)


def _gpu_at(driver: ctypes.CDLL, index: int) -> GpuFound:
    device = _number(driver, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    major, minor = (
        _number(driver, "cuDeviceGetAttribute", attribute, device)
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
    )
    return GpuFound(
        index=index,
        name=name.value.decode(errors="replace"),
        capability=(major, minor),
        memory_mib=memory.value >> 20,
    )


def _number(driver: ctypes.CDLL, function: str, *arguments: int) -> int:
    value = ctypes.c_int()
    _call(driver, function, ctypes.byref(value), *arguments)
    return value.value


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code:
        raise EngineError(f"{function} with CUDA error {code}")


def _seam(name: Seam) -> Finding:
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(found=False, text="not installed")
    if not _gpu().found:
        return Finding(found=False, text=f"{installed} is installed; there is no GPU to reach")
    with open_gpu(seam=name) as gpu:
        free_mib, total_mib = (number >> 20 for number in gpu.memory())
        return Finding(
            found=True,
            text=f"{gpu.seam} reaches {gpu.device.name}, {free_mib} of {total_mib} MiB free",
        )


def _toolkit(name: "ToolkitName") -> Finding:
    for needed in (name, "onnx"):
        if importlib.util.find_spec(needed) is None:
            missing = "" if needed == name else f": the package {needed} is missing beside it"
            return Finding(found=False, text=f"not installed{missing}")
    from engine import plan

    toolkit = plan.open_toolkit(name)
    gpus = _gpu().gpus
    if toolkit.is_rtx and gpus:
        plan.rtx_capability(toolkit, gpus[0].capability)
    return Finding(found=True, text=f"{toolkit.name} is installed")


def _runtime(engine: Engine, device: int = 0) -> Finding:
    chosen = choose(engine, device=device)
    with contextlib.closing(chosen.runtime):
        text = chosen.runtime.name
        if engine == "auto":
            text += f"; {chosen.why if _gpu().found else 'there is no NVIDIA GPU'}"
        return Finding(found=True, text=text)


PARTS: dict[str, Callable[[], Finding]] = {
    "NVIDIA GPU": _gpu,
    "pycuda": lambda: _seam("pycuda"),
    "cuda-bindings": lambda: _seam("cuda-bindings"),
    "TensorRT": lambda: _toolkit("tensorrt"),
    "TensorRT-RTX": lambda: _toolkit("tensorrt_rtx"),
    "OpenVINO, CPU": lambda: _runtime("openvino"),
    "auto": lambda: _runtime("auto"),
}
"""What is looked at, each in a process of its own."""


def _start(part: str, device: int = 0) -> "subprocess.Popen[bytes]":
    # -P: a folder called engine in the user's working directory must not be run instead.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "engine.doctor", part, str(device)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _finish(child: "subprocess.Popen[bytes]", deadline: float) -> Finding:
    try:
        out, err = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # dies when the driver lets go of it
            child.communicate(timeout=KILLED_S)
        return Finding(found=False, text="it hangs when it is used: a broken driver or library?")
    if child.returncode == 0:
        return msgspec.json.decode(out.splitlines()[-1], type=Finding)
    last = err.decode(errors="replace").strip().splitlines()[-1:]
    why = f"it crashes when it is used ({_ending(child.returncode)}): a broken driver or library?"
    return Finding(found=False, text=" ".join([why, *last]))


def _ending(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code:#x}" if code > 255 else f"exit code {code}"


def _child(part: str, device: int) -> int:
    try:
        finding = PARTS[part]() if part in PARTS else _runtime(cast(Engine, part), device)
    except RefocusError as error:
        finding = Finding(found=False, text=str(error))
    except Exception as error:  # noqa: BLE001 - whatever a library raises is a finding
        finding = Finding(found=False, text=f"{type(error).__name__}: {error}")
    sys.stdout.buffer.write(msgspec.json.encode(finding) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], int(sys.argv[2])))
