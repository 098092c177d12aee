"""Memory that two processes share: both see the same, nobody is let near anything else."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refocus import arena
from refocus.arena import PAGE, Arena
from refocus.errors import WireError

posix = pytest.mark.skipif(sys.platform == "win32", reason="there it is no file")
NBYTES = 3 * PAGE
SHAPE = (64, 96)


@pytest.fixture
def made() -> Iterator[Arena]:
    made = Arena.make(4, NBYTES)
    yield made
    made.remove()


def test_what_one_side_writes_the_other_reads(made: Arena) -> None:
    opened = Arena.open(made.name, made.slots, made.slot_bytes)
    for slot in range(4):
        made.plane(slot, SHAPE, "uint16")[:] = slot + 1
    for slot in range(4):
        plane = opened.plane(slot, SHAPE, "uint16")
        assert plane.shape == SHAPE
        assert (plane == slot + 1).all()
        plane[:] = 100
    assert all((made.plane(slot, SHAPE, "uint16") == 100).all() for slot in range(4))


def test_slots_begin_at_whole_pages(made: Arena) -> None:
    for slot in range(4):
        assert made.plane(slot, (5, 7), "uint8").ctypes.data % PAGE == 0
    odd = Arena.make(2, PAGE + 1)
    assert odd.slot_bytes == 2 * PAGE
    odd.remove()


@pytest.mark.parametrize(
    ("slot", "shape"), [(-1, SHAPE), (4, SHAPE), (2**70, SHAPE), (0, (65, 96)), (0, (2**33, 2**33))]
)
def test_there_is_nothing_beyond_a_slot(made: Arena, slot: int, shape: tuple[int, int]) -> None:
    with pytest.raises(WireError):
        made.plane(slot, shape, "uint16")


@posix
def test_it_is_ours_alone_and_gone_when_removed(made: Arena) -> None:
    path = Path(made.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    plane = made.plane(0, SHAPE, "uint16")
    plane[:] = 7
    made.remove()
    assert not path.exists()
    assert (plane == 7).all(), "who has opened it keeps it"
    with pytest.raises(OSError):
        Arena.open(made.name, made.slots, made.slot_bytes)
    made.remove()


def test_a_plane_outlives_the_arena_that_was_closed(made: Arena) -> None:
    opened = Arena.open(made.name, made.slots, made.slot_bytes)
    plane = opened.plane(1, SHAPE, "uint16")
    opened.close()
    made.plane(1, SHAPE, "uint16")[:] = 9
    assert (plane == 9).all()
    with pytest.raises(WireError):
        opened.plane(1, SHAPE, "uint16")


@posix
def test_nobody_is_led_to_another_file(made: Arena, tmp_path: Path) -> None:
    size = PAGE + made.slots * made.slot_bytes
    victim = tmp_path / "notes.txt"
    victim.write_bytes(bytes(size))
    copy = tmp_path / f"{arena.PREFIX}1-copy"
    shutil.copy(made.name, copy)
    linked = tmp_path / f"{arena.PREFIX}1-linked"
    linked.symlink_to(victim)
    for name in (victim, copy, linked, tmp_path, tmp_path / f"{arena.PREFIX}1-none"):
        with pytest.raises((OSError, WireError)):
            Arena.open(str(name), made.slots, made.slot_bytes)
    for slots, slot_bytes in ((5, made.slot_bytes), (4, PAGE), (0, PAGE), (4, 100), (2**40, PAGE)):
        with pytest.raises(WireError):
            Arena.open(made.name, slots, slot_bytes)


def test_half_of_what_is_free_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")

    def free(nbytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=nbytes))

    free(4 * NBYTES + 1)
    few = Arena.make(4, NBYTES)
    assert few.slots == 2
    few.remove()
    free(2 * NBYTES - 1)
    with pytest.raises(OSError, match="no room"):
        Arena.make(4, NBYTES)


@posix
def test_room_that_is_not_there_is_an_error_now_and_no_crash_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = ours()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="no space left"):
        Arena.make(4, NBYTES)
    assert ours() == before
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    written = Arena.make(4, 3 << 20)
    assert Path(written.name).stat().st_blocks * 512 >= written.slots * written.slot_bytes
    written.remove()


@posix
def test_what_a_killed_process_left_is_swept_and_nothing_else(made: Arena) -> None:
    code = "from refocus.arena import Arena; import os; print(Arena.make(2, 4096).name, flush=True)"
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}; os.kill(os.getpid(), {int(signal.SIGKILL)})"],
        capture_output=True,
        text=True,
        check=False,
    )
    left = Path(killed.stdout.strip())
    assert left.exists()
    arena.sweep()
    assert not left.exists()
    assert Path(made.name).exists()


def test_both_sides_compute_with_any_dtype(made: Arena) -> None:
    plane = made.plane(0, (64, 64), "uint8")
    plane[:] = np.arange(64, dtype=np.uint8)
    assert made.plane(0, (64, 64), "uint8").sum() == 64 * np.arange(64).sum()


def ours() -> set[Path]:
    """Arenas of this process that are on disk."""
    return set(arena._folder().glob(f"{arena.PREFIX}{os.getpid()}-*"))
