"""Starts the processes of benchmarks/storage.py: timed rounds, kills, full disks."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import msgspec

from benchmarks.writers.contenders import Contender
from benchmarks.writers.peers import Shape
from benchmarks.writers.process import (
    ACK,
    Filled,
    Job,
    Measured,
    Task,
    in_fresh_process,
    result_of,
    start,
)
from refocus.errors import RunError

KILL_FPS = 40.0
KILL_AFTER_PLANES = (10, 90)
DISK_PLANES = 20.5
OFFERED_PLANES = 40

# A mount namespace of its own: the mount ends with the process, and nobody else sees it.
_ON_SMALL_DISK = (
    *("unshare", "--map-root-user", "--mount", "sh", "-c"),
    'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"',
    "sh",
)


class Bench(msgspec.Struct, frozen=True):
    """Where and with what all contenders are measured."""

    folder: Path
    frames: Path
    shape: Shape
    planes: int
    """Of one array."""

    def measure(self, contender: Contender) -> Measured | str:
        """One timed run; a text says why there is none."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            try:
                return result_of(start(self.job("measure", contender, scratch)), Measured)
            except RunError as error:
                return str(error)

    def kill(self, contender: Contender, chance: random.Random) -> tuple[int, int]:
        """Kill a writer at a random moment: planes it had called written, and lost of those."""
        planes = chance.randint(*KILL_AFTER_PLANES) * contender.arrays
        fps = KILL_FPS * contender.arrays
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            job = self.job("announce", contender, scratch, 2 * KILL_AFTER_PLANES[1], fps)
            announced = len(announcements(job, planes, 2 * chance.random() / fps))
            right = in_fresh_process(msgspec.structs.replace(job, planes=announced))
        return announced, announced - sum(right)

    def fill(self, contender: Contender) -> Filled | None:
        """Fill up a writer's disk. None where this system allows no mount."""
        plane_bytes = 2 * self.shape[0] * self.shape[1]
        size = str(int(DISK_PLANES * contender.arrays * plane_bytes))
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            if not _can_mount(scratch):
                return None
            job = self.job("fill", contender, scratch, OFFERED_PLANES)
            return result_of(start(job, *_ON_SMALL_DISK, size, scratch), Filled)

    def job(
        self,
        task: Task,
        contender: Contender,
        folder: str,
        planes: int | None = None,
        fps: float = 0.0,
    ) -> Job:
        """A process's task; *planes* are those of one array, by default as many as in a round."""
        return Job(
            task=task,
            contender=contender.name,
            folder=folder,
            frames=str(self.frames),
            shape=self.shape,
            planes=(planes or self.planes) * contender.arrays,
            fps=fps,
        )


def announcements(job: Job, planes: int, delay_s: float = 0.0) -> list[int]:
    """Kill a writer *delay_s* after its *planes*-th announcement; returns all of them, in ns."""
    process = start(job)
    assert process.stdout is not None
    acks = process.stdout.read(ACK.size * planes)
    time.sleep(delay_s)
    process.kill()
    rest, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise RunError(f"{job.contender} died by itself: {errors.decode(errors='replace')}")
    return [time_ns for (time_ns,) in ACK.iter_unpack(acks + rest)]


def measure_rounds(
    bench: Bench, contenders: list[Contender], rounds: int
) -> dict[str, list[Measured | str]]:
    """All rounds by contender, each round in an order of its own."""
    done: dict[str, list[Measured | str]] = defaultdict(list)
    for number in range(rounds):
        for contender in random.Random(number).sample(contenders, len(contenders)):
            print(f"round {number + 1}: {contender.name}", file=sys.stderr)
            done[contender.name].append(bench.measure(contender))
    return done


def _can_mount(folder: str) -> bool:
    command = [*_ON_SMALL_DISK, "1m", folder, "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
