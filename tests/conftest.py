"""No thread and no process outlives a test; the data folder comes from REFOCUS_DATA."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from faulty_os import FaultyOs

from engine.package import Package
from store import disk
from tests import identity_package
from tests.branch import Branch, settings

GRACE_S = 5.0
"""What is on its way out may take so long; what is still there afterwards has leaked."""


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's plans, models and keys; workers inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "DATA", "CONFIG", "STATE"):
            patch.setenv(f"XDG_{kind}_HOME", str(tmp_path_factory.mktemp(kind.lower())))
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test that leaves a thread or a child process."""
    threads = set(threading.enumerate())
    processes = set(psutil.Process().children(recursive=True))
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := _left(threads, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"left behind: {left}"


@pytest.fixture(autouse=True, scope="module")
def native_objects_die_where_they_were_made() -> Iterator[None]:
    """OpenVINO's objects belong to one thread: Python's collector must not free them on another."""
    yield
    gc.collect()


def _left(threads: set[threading.Thread], processes: set[psutil.Process]) -> list[str]:
    # zarr's event loop, and the thread with which pyzmq gives back zero-copy buffers, are made once
    # and belong to the process.
    new_threads = [
        thread.name
        for thread in threading.enumerate()
        if thread not in threads
        and not thread.name.startswith(("zarr", "asyncio"))
        and type(thread).__name__ != "GarbageCollectorThread"
    ]
    new_processes = [
        repr(child) for child in psutil.Process().children(recursive=True) if child not in processes
    ]
    return new_threads + new_processes


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyOs:
    """Stands in for the system in every call of the store that changes a file."""
    stand_in = FaultyOs()
    monkeypatch.setattr(disk, "os", stand_in)
    return stand_in


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the real stacks (docs/data.md says where each can be had)."""
    folder = os.environ.get("REFOCUS_DATA")
    if not folder:
        pytest.skip("REFOCUS_DATA is not set: no real image data here")
    return Path(folder)


@pytest.fixture
def branch(tmp_path: Path) -> Iterator[Callable[..., Branch]]:
    opened: list[Branch] = []

    def open_branch(package: Package | None = None, **engine: int) -> Branch:
        package = package or identity_package.make(tmp_path / "negated", answer="negated")
        opened.append(Branch(settings(package, **engine), tmp_path / f"run{len(opened)}"))
        return opened[-1]

    yield open_branch
    for one in opened:
        one.close()


@pytest.fixture
def negated(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "negated", name="negated", answer="negated")
