"""A stand-in for `os` in store/disk.py, and processes that may die.

A test sees every call that changes a file of a run, or makes it durable, in order, and says what
becomes of it: done, done by half, refused, or the last thing that its process does.
"""

import contextlib
import functools
import itertools
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from store import disk

CHANGES = frozenset(
    [
        "open",
        "pwrite",
        "write",
        "ftruncate",
        "mkdir",
        "rmdir",
        "unlink",
        "rename",
        "replace",
        "fdatasync",
        "fsync",
    ]
)
WINDOWS = ("pwrite", "pread", "fdatasync", "O_DIRECT", "posix_fadvise", "posix_fallocate")
"""What `os` lacks there."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@dataclass(frozen=True)
class Call:
    """One call that changes a file, or makes it durable."""

    number: int
    """Of all such calls, from 0."""
    name: str
    path: Path
    args: tuple[Any, ...]

    @property
    def writes(self) -> bool:
        """Whether it puts bytes into a file."""
        return self.name in ("pwrite", "write")

    def do(self) -> Any:
        """What the system answers."""
        return getattr(os, self.name)(*self.args)

    def do_half(self) -> Any:
        """Write the first half of the bytes only."""
        descriptor, data, *offset = self.args
        half = memoryview(data)[: len(data) // 2]
        return getattr(os, self.name)(descriptor, half, *offset)


Rule = Callable[[Call], Any]


class FaultyOs:
    """`os`, of which *rule* answers every call in CHANGES; *without*: names it does not have."""

    def __init__(self, rule: Rule = Call.do, *, without: Collection[str] = ()) -> None:
        self.rule = rule
        self._without = without
        self.numbers = itertools.count()
        self._paths: dict[int, Path] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self._without:
            raise AttributeError(name)
        found = getattr(os, name)
        return functools.partial(self._change, name) if name in CHANGES else found

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    def _change(self, name: str, *args: Any) -> Any:
        if name == "open":
            path = Path(args[0])
            makes = args[1] & (os.O_CREAT | os.O_TRUNC)
            answer = self._ask(name, path, args) if makes else os.open(*args)
            self._paths[answer] = path
            return answer
        target = args[1] if name == "replace" else args[0]
        return self._ask(name, self._paths[target] if type(target) is int else Path(target), args)

    def _ask(self, name: str, path: Path, args: tuple[Any, ...]) -> Any:
        return self.rule(Call(next(self.numbers), name, path, args))


def die() -> None:
    """kill -9 to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(number: int) -> Rule:
    """Before the call of this number."""

    def rule(call: Call) -> Any:
        return die() if call.number == number else call.do()

    return rule


def dies_within(number: int) -> Rule:
    """When half of the bytes of the write of this number are written."""
    writes = itertools.count()

    def rule(call: Call) -> Any:
        if call.writes and next(writes) == number:
            call.do_half()
            die()
        return call.do()

    return rule


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where the system has that: thousands of runs are written there."""
    memory = Path("/dev/shm")
    usable = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="refocus-test-", dir=usable) as folder:
        yield Path(folder)


Say = Callable[[str], None]
"""Takes a line, without its end."""


class Child:
    """A process of its own that does *work(say)* on a disk that follows *rule*."""

    def __init__(self, work: Callable[[Say], None], rule: Rule = Call.do) -> None:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside zarr's idle thread
            self._pid = os.fork()
        if not self._pid:
            _work_and_exit(work, rule, writing)
        os.close(writing)
        self._pipe = open(reading, encoding="utf-8")  # noqa: PTH123, SIM115  # a descriptor, closed by `end`
        self.lines = (line.removesuffix("\n") for line in self._pipe if line.endswith("\n"))
        """What it says; each line once, whole ones only."""

    def kill(self) -> None:
        """kill -9."""
        os.kill(self._pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end: an exit code, or a negative signal number."""
        self._pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def in_a_child(work: Callable[[Say], None], rule: Rule = Call.do) -> tuple[int, list[str]]:
    """Do *work* in a process of its own: how it ended (as `Child.end`), and what it said."""
    child = Child(work, rule)
    said = list(child.lines)
    return child.end(), said


def _work_and_exit(work: Callable[[Say], None], rule: Rule, writing: int) -> None:
    code = 1
    try:
        setattr(disk, "os", FaultyOs(rule))  # noqa: B010  # the child ends with it
        with open(writing, "w", encoding="utf-8", buffering=1) as pipe:
            work(lambda line: print(line, file=pipe))
        code = 0
    except BaseException:  # noqa: BLE001  # nothing of pytest may go on in this process
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
