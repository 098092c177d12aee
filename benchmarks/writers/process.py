"""What one process of benchmarks/storage.py does: python -m benchmarks.writers.process JOB

Every contender writes in a process of its own, so that none pays for another's threads and caches,
and what is left on the disk is read back in yet another one where the writer was killed or failed.
Linux only: syncfs, and the peak of resident memory that /proc can set back.
"""

import ctypes
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import numpy as np

from benchmarks.writers.contenders import Contender, named
from benchmarks.writers.peers import DTYPE, Reader, Shape
from refocus.errors import RunError
from refocus.frame import Pixels
from store.disk import aligned_memory
from store.records import crc32c

Task = Literal["measure", "announce", "fill", "read"]
Result = TypeVar("Result")

FRAMES = 13
"""Different frames; not a divisor of any shard's length, so a plane in a wrong slot shows."""
WARM_UP_PLANES = 2
ACK = struct.Struct("<q")
"""What "announce" says of a plane: the monotonic clock when it was called written, in ns."""
ROOT = Path(__file__).parents[2]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One process's task."""

    task: Task
    contender: str
    folder: str
    frames: str
    """File made by `make_frames`."""
    shape: Shape
    planes: int
    fps: float = 0.0
    """Planes a second for "announce"; 0: as fast as they go."""


class Measured(msgspec.Struct, frozen=True):
    """Result of "measure"."""

    seconds: float
    """From the first append until everything is on the disk."""
    cpu_s: float
    append_ms: list[float]
    extra_rss_mib: float
    damaged: int
    """Planes that could not be read back as they were written."""


class Filled(msgspec.Struct, frozen=True):
    """Result of "fill"."""

    accepted: int
    raised: Literal["append", "close", "never"]
    lost: int
    """Accepted planes that a fresh process cannot read back."""


def start(job: Job, *before: str) -> "subprocess.Popen[bytes]":
    """A process that does *job*; *before* is put in front of its command line."""
    command = [sys.executable, "-m", "benchmarks.writers.process"]
    return subprocess.Popen(
        [*before, *command, msgspec.json.encode(job).decode()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def result_of(process: "subprocess.Popen[bytes]", kind: type[Result]) -> Result:
    """What a process answers. Raises RunError with the last it said where it died."""
    answer, errors = process.communicate()
    if process.returncode:
        said = errors.decode(errors="replace").strip().splitlines()
        raise RunError(said[-1] if said else f"its process ended with {process.returncode}")
    return msgspec.json.decode(answer, type=kind)


def make_frames(path: Path, shape: Shape) -> None:
    """Write the frames that all contenders store: light (Poisson) and a camera's read noise."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(FRAMES):
            counts = rng.poisson(400, shape) + rng.normal(100, 2, shape)
            file.write(counts.astype(DTYPE).data)


def load_frames(path: Path, shape: Shape) -> list[Pixels]:
    """The frames, each on whole pages of memory, large ones, which a disk reads best; read-only."""
    frames = []
    with path.open("rb") as file:
        for _ in range(FRAMES):
            memory = aligned_memory(shape[0] * shape[1] * np.dtype(DTYPE).itemsize)
            file.readinto(memory.data)
            frame = memory.view(DTYPE).reshape(shape)
            frame.flags.writeable = False
            frames.append(frame)
    return frames


def measure(job: Job, contender: Contender) -> Measured:
    """Write all planes as fast as they go, make them durable, and read them back."""
    frames = load_frames(Path(job.frames), job.shape)
    folder = Path(job.folder)
    _warm_up(contender, folder / "warm-up", frames, job.shape)
    (folder / "measured").mkdir()
    writer = contender.open(folder / "measured", job.shape)
    sync(folder)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    rss, cpu_s, began = _memory_mib("VmRSS"), _cpu_s(), time.perf_counter()
    append_ms = []
    for index in range(job.planes):
        called = time.perf_counter()
        writer.append(index, frames[index % FRAMES])
        append_ms.append(1e3 * (time.perf_counter() - called))
    writer.close()
    sync(folder)
    seconds, cpu_s, peak = time.perf_counter() - began, _cpu_s() - cpu_s, _memory_mib("VmHWM")
    right = _right(contender.read(folder / "measured", job.shape), frames, job.planes)
    return Measured(seconds, cpu_s, append_ms, peak - rss, job.planes - sum(right))


def announce(job: Job, contender: Contender, out: int) -> None:
    """Write planes at a steady rate, and say on *out* of each that it is written (`ACK`).

    The writer is never closed: who started this process ends it by kill -9.
    """
    frames = load_frames(Path(job.frames), job.shape)
    writer = contender.open(Path(job.folder), job.shape)
    began = time.perf_counter()
    for index in range(job.planes):
        if job.fps:
            time.sleep(max(0.0, began + index / job.fps - time.perf_counter()))
        writer.append(index, frames[index % FRAMES])
        writer.settle()
        os.write(out, ACK.pack(time.monotonic_ns()))
    signal.pause()


def fill(job: Job, contender: Contender) -> Filled:
    """Write planes until one is refused, close, and see in a fresh process what is there."""
    frames = load_frames(Path(job.frames), job.shape)
    writer = contender.open(Path(job.folder), job.shape)
    accepted = 0
    raised: Literal["append", "close", "never"] = "never"
    try:
        for index in range(job.planes):
            writer.append(index, frames[index % FRAMES])
            writer.settle()
            accepted += 1
    except Exception:  # noqa: BLE001  # every library has its own
        raised = "append"
    try:
        writer.close()
    except Exception:  # noqa: BLE001
        raised = "close" if raised == "never" else raised
    right = in_fresh_process(msgspec.structs.replace(job, planes=accepted))
    return Filled(accepted, raised, accepted - sum(right))


def read(job: Job, contender: Contender) -> list[bool]:
    """Which planes a reader finds as they were written; none where it cannot open the folder."""
    frames = load_frames(Path(job.frames), job.shape)
    try:
        planes = contender.read(Path(job.folder), job.shape)
    except Exception:  # noqa: BLE001
        return [False] * job.planes
    return _right(planes, frames, job.planes)


def in_fresh_process(job: Job) -> list[bool]:
    """`read` in a process of its own."""
    try:
        return result_of(start(msgspec.structs.replace(job, task="read")), list[bool])
    except RunError:  # the library's reader took the process with it
        return [False] * job.planes


def sync(folder: Path) -> None:
    """Make everything on the file system of *folder* durable: one call, the same for all."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(descriptor)


def _warm_up(contender: Contender, folder: Path, frames: list[Pixels], shape: Shape) -> None:
    """Imports, threads and first-time costs of a library, outside of what is timed."""
    folder.mkdir()
    writer = contender.open(folder, shape)
    for index in range(WARM_UP_PLANES):
        writer.append(index, frames[index])
    writer.close()


def _right(planes: Reader, frames: list[Pixels], count: int) -> list[bool]:
    wanted = [crc32c(frame) for frame in frames]
    return [_crc_of(planes, index) == wanted[index % FRAMES] for index in range(count)]


def _crc_of(planes: Reader, index: int) -> int | None:
    try:
        pixels = planes(index)
    except Exception:  # noqa: BLE001  # every library has its own
        return None
    return None if pixels is None else crc32c(np.ascontiguousarray(pixels))


def _cpu_s() -> float:
    """User and system time of this process with all its threads, and of its children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _memory_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status says nothing of {key}")


def main() -> None:
    """Do the job on the command line and print its result as JSON."""
    out = os.dup(1)
    os.dup2(2, 1)  # some libraries print
    job = msgspec.json.decode(sys.argv[1], type=Job)
    contender = named(job.contender)
    match job.task:
        case "measure":
            os.write(out, msgspec.json.encode(measure(job, contender)))
        case "announce":
            announce(job, contender, out)
        case "fill":
            os.write(out, msgspec.json.encode(fill(job, contender)))
        case "read":
            os.write(out, msgspec.json.encode(read(job, contender)))


if __name__ == "__main__":
    main()
