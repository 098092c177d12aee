"""Copies of a run, each left as `finish` leaves it when it is killed at one of its file operations.

    python killed_finish.py RUN OUT SHARD_BYTES

Copy OUT/n was killed by SIGKILL just before operation n, as far as there are operations. Prints
how many copies were killed. Python's audit events tell of the operations, those of the zarr library
included. A forked child a copy: a kill costs no start of an interpreter.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from store import packing
from store.finish import finish

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill_at(operation: int, run: Path) -> None:
    """This process kills itself before its *operation*-th change of *run*."""
    seen = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and arguments[2] & WRITING)
        if changes and str(run) in str(arguments[0]) and next(seen) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(run: Path, out: Path) -> int:
    """Number of copies that were killed."""
    for operation in itertools.count():
        copy = out / f"{operation:03d}"
        shutil.copytree(run, copy)
        child = os.fork()
        if not child:
            kill_at(operation, copy)
            finish(copy, compress=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, f"finish failed at operation {operation}: {status}"
            shutil.rmtree(copy)
            return operation
    raise AssertionError("finish never ends")


if __name__ == "__main__":
    packing.SHARD_BYTES = int(sys.argv[3])
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
