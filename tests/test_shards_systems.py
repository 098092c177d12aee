"""Slots on every kind of system: with and without direct writes, positioned writes, and holes."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from faulty_os import WINDOWS, Call, FaultyOs, die, in_a_child, needs_fork
from shard_arrays import MIB_SHAPE, Arrays, plane
from store_runs import SHAPE

from refocus.frame import Pixels
from store import disk
from store.planes import PlaneArray


@pytest.fixture
def mib_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four MiB."""
    monkeypatch.setattr("store.grid.SHARD_BYTES", 4 << 20)


@pytest.fixture
def arrays(tmp_path: Path) -> Iterator[Arrays]:
    opened = Arrays(tmp_path)
    yield opened
    opened.shards.close()


def aligned(content: Pixels) -> Pixels:
    """A copy of a plane at the start of a page of memory."""
    memory = disk.aligned_memory(content.nbytes)
    memory[:] = content.reshape(-1).view(np.uint8)
    return memory.view(content.dtype).reshape(content.shape)


def passes_by_the_cache(call: Call) -> bool:
    fcntl = pytest.importorskip("fcntl", reason="no direct writes on this system")
    return bool(fcntl.fcntl(call.args[0], fcntl.F_GETFL) & os.O_DIRECT)


def direct_folder(folder: Path) -> Path:
    if not disk.takes_direct_writes(folder):
        pytest.skip(f"no write passes by the page cache in {folder}")
    return folder


@pytest.mark.usefixtures("mib_shards")
def test_a_page_aligned_frame_goes_to_the_disk_from_where_it_lies(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    arrays = Arrays(direct_folder(tmp_path))
    array = arrays.add("a", MIB_SHAPE)
    direct: list[int] = []

    def look(call: Call) -> Any:
        if call.writes and passes_by_the_cache(call):
            direct.append(np.asarray(call.args[1]).ctypes.data)
        return call.do()

    faulty.rule = look
    frames = {(t, 0, 0): aligned(plane((t, 0, 0), MIB_SHAPE)) for t in range(4)}
    for place, content in frames.items():
        array.write(*place, array.stage(content))
    assert direct == [content.ctypes.data for content in frames.values()]
    arrays.written["a"] = frames
    arrays.assert_right()
    arrays.shards.close()


@pytest.mark.usefixtures("mib_shards")
@pytest.mark.parametrize("shape", [MIB_SHAPE, (613, 1021)])
def test_a_frame_that_lies_anywhere_passes_by_the_cache_too(
    tmp_path: Path, faulty: FaultyOs, shape: tuple[int, int]
) -> None:
    arrays = Arrays(direct_folder(tmp_path))
    array = arrays.add("a", shape)
    direct: list[int] = []

    def look(call: Call) -> Any:
        if call.writes and passes_by_the_cache(call):
            direct.append(len(call.args[1]))
        return call.do()

    faulty.rule = look
    for t in range(9):
        content = plane((t, 0, 0), shape)
        odd = np.empty(content.nbytes + 1, np.uint8)[1:].view("uint16").reshape(shape)
        odd[:] = content
        array.write(t, 0, 0, array.stage(odd))
        arrays.written["a"][t, 0, 0] = content
    assert array.grid is not None
    assert direct == 9 * [array.grid.stride]
    arrays.assert_right()
    arrays.shards.close()


@pytest.mark.usefixtures("mib_shards")
@pytest.mark.parametrize("written", ["nothing", "half"])
def test_a_place_that_takes_no_direct_write_gets_its_planes_through_the_cache(
    tmp_path: Path, faulty: FaultyOs, written: str
) -> None:
    arrays = Arrays(direct_folder(tmp_path))
    array = arrays.add("a", MIB_SHAPE)
    arrays.write("a", (0, 0, 0), (1, 0, 0))
    refused: list[int] = []

    def refuse(call: Call) -> Any:
        if call.writes and passes_by_the_cache(call):
            refused.append(call.number)
            if written == "half" and len(refused) == 1:
                return os.pwrite(call.args[0], call.args[1][:4096], call.args[2])
            raise OSError(errno.EINVAL, "Invalid argument")
        return call.do()

    staged = array.stage(plane((2, 0, 0), MIB_SHAPE))  # while direct writes still worked
    faulty.rule = refuse
    array.write(2, 0, 0, staged)
    arrays.written["a"][2, 0, 0] = plane((2, 0, 0), MIB_SHAPE)
    arrays.write("a", (3, 0, 0), (9, 0, 0))
    assert len(refused) == (2 if written == "half" else 1), "it is not tried again"
    arrays.assert_right()
    arrays.shards.close()


def test_a_file_system_in_memory_only_pretends_to_take_direct_writes() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        pytest.skip("no file system in memory here")
    folder = memory / f"refocus-test-{os.getpid()}"
    folder.mkdir()
    try:
        assert not disk.takes_direct_writes(folder)
        assert disk.has_sparse_files(folder)
        assert not list(folder.iterdir())
    finally:
        folder.rmdir()


def test_without_positioned_writes_the_same_bytes_lie_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.grid.SHARD_BYTES", 4 << 20)
    places = [(t, c, z) for t in (0, 2, 1) for c in range(2) for z in (2, 0)]
    for name in ("here", "windows"):
        if name == "windows":
            monkeypatch.setattr(disk, "os", FaultyOs(without=WINDOWS))
        (tmp_path / name).mkdir()
        arrays = Arrays(tmp_path / name)
        for form in (SHAPE, MIB_SHAPE):
            arrays.add(f"{form[0]}", form, stack_planes=3)
            arrays.write(f"{form[0]}", *places)
        arrays.reopen()
        arrays.write("24", (7, 0, 0))
        arrays.trim("24")
        arrays.assert_right()
        arrays.shards.close()
    assert files(tmp_path / "windows") == files(tmp_path / "here")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below *folder*, with its holes left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(bytes(4096), b"")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def no_sparse_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "has_sparse_files", lambda folder: False)


@pytest.mark.usefixtures("no_sparse_files")
def test_without_sparse_files_a_plane_is_a_file(arrays: Arrays) -> None:
    array = arrays.add("a", stack_planes=3)
    assert array.grid is None
    places = [(4, 0, 0), (0, 0, 2), (1, 1, 0)]
    for place in places:
        array.write(*place, array.stage(plane(place)))
    black = np.zeros(SHAPE, np.uint16)
    array.write(2, 0, 0, array.stage(black))
    by_zarr = zarr.open_array(arrays.folder / "a", mode="r")
    for place in places:
        np.testing.assert_array_equal(by_zarr[place], plane(place))
        np.testing.assert_array_equal(
            PlaneArray.open(arrays.folder / "a").read(*place), plane(place)
        )
    names = {path.name for path in (arrays.folder / "a").glob("c.*")}
    assert names == {"c.4.0.0.0.0", "c.0.0.2.0.0", "c.1.1.0.0.0", "c.2.0.0.0.0"}
    array.trim(5, 2, 3)
    assert zarr.open_array(arrays.folder / "a", mode="r").shape == (5, 2, 3, *SHAPE)


def test_a_file_system_that_fills_holes_is_found_out(tmp_path: Path, faulty: FaultyOs) -> None:
    assert disk.has_sparse_files(tmp_path)

    def fill(call: Call) -> Any:
        if call.writes:
            os.pwrite(call.args[0], bytes(call.args[2]), 0)
        return call.do()

    faulty.rule = fill
    assert not disk.has_sparse_files(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_fork
def test_what_a_kill_left_of_trying_the_disk_out_is_in_nobodys_way(tmp_path: Path) -> None:
    def rule(call: Call) -> Any:
        return die() if call.writes else call.do()

    code, _ = in_a_child(lambda say: say(str(disk.has_sparse_files(tmp_path))), rule)
    assert code == -signal.SIGKILL
    assert disk.has_sparse_files(tmp_path)
    assert not list(tmp_path.iterdir())
