"""A stand-in for libcuda.so.1 that both bindings load like the real one: no GPU, the real calls.

What it is good for: that every call has the arguments the driver wants, that work is waited for
(streams do nothing before somebody waits), that all is released in the right order by the right
thread, and what happens when a call fails. Its kernels are engine/gpu/convert.cu compiled for the
host. What it cannot show: speed, real concurrency, and what a real driver does beyond its manual.

It stays in the process once it is loaded, without a GPU plugged in unless a test `plug`s one in. A
process that has loaded the real driver before cannot have it.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SOURCES = ("driver.cpp", "graphs.cpp")
KERNELS = HERE.parents[1] / "engine" / "gpu"
MEMORY_BYTES = 256 << 20

ILLEGAL_ADDRESS = 700
OUT_OF_MEMORY = 2

KINDS = (
    "memory", "pinned", "streams", "events", "modules", "graphs", "executables",
    "retained", "pushed", "captures", "damaged",
)  # fmt: skip

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
FAKE_DRIVER = "REFOCUS_FAKE_DRIVER"
"""Name of the environment variable that tells another process where the compiled one lies."""

_enqueued: list[Any] = []
"""C keeps no reference to what was put into its streams."""


@functools.cache
def compiled() -> Path:
    """Compile it, once a process; skips the test where that is not possible.

    A process started with its path in the environment as FAKE_DRIVER takes that one.
    """
    if told := os.environ.get(FAKE_DRIVER):
        return Path(told)
    if sys.platform != "linux" or not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("the fake driver takes Linux, g++ and nm")
    folder = Path(tempfile.mkdtemp(prefix="refocus-test-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "stubs.cpp").write_text(_stubs())
    sources = [*(str(HERE / name) for name in SOURCES), str(folder / "stubs.cpp")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", f"-I{KERNELS}"]
    library = folder / "libcuda.so.1"
    subprocess.run(
        ["g++", *flags, f"-Wl,-soname,{library.name}", "-o", str(library), *sources, "-ldl"],
        check=True,
    )
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Load it into this process, before anything loads the real one; else skips the test."""
    fake = ctypes.CDLL(str(compiled()), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(ctypes.CDLL(compiled().name), "fake_reset"):
        pytest.skip("this process has loaded NVIDIA's own driver")
    return fake


def reset(plugged_in: bool = True) -> None:
    """As after a restart: nothing allocated, nothing broken, no fault to come, 256 MiB."""
    _enqueued.clear()
    load().fake_reset(plugged_in, ctypes.c_size_t(MEMORY_BYTES))


@contextlib.contextmanager
def plugged_in() -> Iterator[None]:
    """A machine with one GPU, meanwhile."""
    reset()
    try:
        yield
    finally:
        reset(plugged_in=False)


def set_memory(total_bytes: int) -> None:
    """What the GPU has in all, and as much can be pinned on the host."""
    load().fake_set_memory(ctypes.c_size_t(total_bytes))


def fail_at(number: int, code: int, *, function: str = "", sticky: bool = True) -> None:
    """The *number*-th call from now on (from 1; of *function*, or of any) answers *code*.

    *sticky*: so does everything after it, as when the context is broken. One fault at a time.
    """
    load().fake_fail(function.encode(), number, code, sticky)


def alive() -> dict[str, int]:
    """How many of each kind exist; empty where all was given back."""
    counts = (ctypes.c_int * len(KINDS))()
    load().fake_alive(counts)
    return {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}


def calls() -> list[str]:
    """Names of the driver's functions that were called since the last reset, in order."""
    text = ctypes.create_string_buffer(1 << 20)
    load().fake_calls(text, len(text))
    return text.value.decode().split()


def enqueue(stream: int, work: Callable[[], object]) -> None:
    """Put *work* into a stream, or the graph that is captured there, as if a kernel did it."""

    @HOST_FUNCTION
    def function(_: object) -> None:
        work()

    _enqueued.append(function)
    failed = load().cuLaunchHostFunc(ctypes.c_void_p(stream), function, None)
    assert not failed, f"cuLaunchHostFunc failed with {failed}"


def _stubs() -> str:
    """What pycuda's extension wants to see at load, and what nobody here calls: not supported."""
    found = sorted(Path(one) for path in sys.path for one in Path(path).glob("pycuda/_driver*.so"))
    if not found:
        return ""
    listing = ["nm", "-D", "--undefined-only", str(found[0])]
    wanted = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", wanted)))
    return "".join(
        f'extern "C" __attribute__((weak)) int {name}() {{ return 801; }}\n' for name in names
    )
