"""Planes in their slots: in any order, in any form, on any system, and read by others at once."""

import errno
import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from faulty_os import WINDOWS, Call, FaultyOs, die, in_a_child, needs_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from store_runs import SHAPE

from refocus.errors import RunError
from refocus.frame import Pixels
from store import disk, shards
from store.planes import PlaneArray
from store.shards import MAX_SLOTS, Grid, Shards, read_index, slots_of

Place = tuple[int, int, int]
"""t, c, z."""
PAGE_SHAPE = (32, 64)
"""A plane of uint16 that fills a page exactly."""
MIB_SHAPE = (512, 1024)
"""A plane of uint16 that passes by the page cache."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four pages."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * disk.PAGE)


@pytest.fixture
def mib_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four MiB."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 << 20)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyOs:
    stand_in = FaultyOs()
    monkeypatch.setattr(disk, "os", stand_in)
    return stand_in


def plane(place: Place, shape: tuple[int, int] = SHAPE, dtype: str = "uint16") -> Pixels:
    """Noise that differs from place to place, of the whole range of values."""
    t, c, z = place
    noise = np.random.default_rng([t, c, z]).integers(0, 256, (*shape, np.dtype(dtype).itemsize))
    if dtype == "float32":
        return noise[..., 0].astype(dtype) / 7
    return noise.astype(np.uint8).view(dtype)[..., 0]


class Arrays:
    """Arrays open for writing in one folder, and what they should hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = Shards(folder)
        self.arrays: dict[str, PlaneArray] = {}
        self.written: dict[str, dict[Place, Pixels]] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, int] = SHAPE,
        dtype: str = "uint16",
        stack_planes: int = 1,
    ) -> PlaneArray:
        """A new array."""
        self.arrays[name] = PlaneArray.create(
            self.folder / name, shape, dtype, self.shards, stack_planes=stack_planes
        )
        self.written[name] = {}
        return self.arrays[name]

    def write(self, name: str, *places: Place) -> None:
        """Planes in this order."""
        array = self.arrays[name]
        for place in places:
            content = plane(place, array.shape[3:], array.dtype)
            array.write(*place, array.stage(content))
            self.written[name][place] = content

    def reopen(self) -> None:
        """As another process would go on."""
        self.shards.close()
        self.shards = Shards(self.folder)
        self.arrays = {
            name: PlaneArray.open(self.folder / name, self.shards) for name in self.arrays
        }

    def trim(self, name: str) -> None:
        """Cut the array to its planes."""
        places = self.written[name]
        self.arrays[name].trim(*(max(p[axis] for p in places) + 1 for axis in range(3)))

    def assert_right(self) -> None:
        """Every plane is there, for zarr and for us, and nothing else is; files say no more."""
        for name, planes in self.written.items():
            array = PlaneArray.open(self.folder / name)
            by_zarr = np.asarray(zarr.open_array(self.folder / name, mode="r")[:])
            wanted = np.zeros_like(by_zarr)
            for place, content in planes.items():
                wanted[place] = content
                np.testing.assert_array_equal(array.read(*place), content, strict=True)
            np.testing.assert_array_equal(by_zarr, wanted, strict=True)
            assert listed(array) == set(planes)


def listed(array: PlaneArray) -> set[Place]:
    """The planes that the indices on disk list."""
    grid = array.grid
    assert grid is not None
    found = set()
    for path in array.shard_files():
        _, t, c, z, *_ = path.name.split(".")
        index = read_index(path, grid)
        assert index is not None
        assert path.stat().st_size == grid.file_bytes
        for slot in slots_of(index):
            in_t, in_z = divmod(slot, grid.z)
            found.add((int(t) * grid.t + in_t, int(c), int(z) * grid.z + in_z))
    return found


@pytest.fixture
def arrays(tmp_path: Path) -> Iterator[Arrays]:
    opened = Arrays(tmp_path)
    yield opened
    opened.shards.close()


@pytest.mark.usefixtures("small_shards")
def test_planes_come_in_any_order_with_gaps_and_latecomers(arrays: Arrays) -> None:
    arrays.add("a")
    arrays.write("a", (9, 0, 0), (0, 0, 0), (2, 1, 0), (3, 0, 0), (1, 0, 3), (25, 0, 0), (1, 0, 0))
    arrays.assert_right()
    assert sorted(path.name for path in arrays.arrays["a"].shard_files()) == [
        "c.0.0.0.0.0",
        "c.0.0.3.0.0",
        "c.0.1.0.0.0",
        "c.2.0.0.0.0",
        "c.6.0.0.0.0",
    ]


@pytest.mark.usefixtures("small_shards")
def test_two_arrays_and_several_positions_grow_at_once(arrays: Arrays) -> None:
    forms = [((24, 37), "uint16"), ((5, 3), "uint8"), ((1, 1), "float32"), ((70, 64), "uint16")]
    names = [f"{number}/{twin}" for number in range(len(forms)) for twin in (0, 1)]
    for name in names:
        shape, dtype = forms[int(name[0])]
        arrays.add(name, shape, dtype)
    for t, name in itertools.product(range(11), names):
        if t % 3 or name.endswith("0"):
            arrays.write(name, (t, 0, 0))
    arrays.assert_right()


@pytest.mark.usefixtures("small_shards")
def test_a_latecomer_finds_the_index_of_a_shard_that_was_put_away(
    arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    before = open_files()
    arrays.add("a")
    arrays.write("a", *((t, 0, 0) for t in range(0, 40, 2)))
    assert open_files() - before <= 2
    arrays.write("a", *((t, 0, 0) for t in range(1, 40, 2)))
    arrays.assert_right()
    arrays.reopen()
    arrays.write("a", *((t, 1, 0) for t in range(40)), *((t, 0, 1) for t in range(40)))
    arrays.assert_right()


def open_files() -> int:
    """Descriptors of this process."""
    listing = Path("/proc/self/fd")
    if not listing.exists():
        pytest.skip("this system does not list a process's open files")
    return len(list(listing.iterdir()))


@pytest.mark.parametrize("stack_planes", [1, 2, 3, 4, 5, 7, 16, 300])
@pytest.mark.usefixtures("small_shards")
def test_stacks_of_any_height_whatever_was_said_of_them(arrays: Arrays, stack_planes: int) -> None:
    array = arrays.add("a", stack_planes=stack_planes)
    grid = array.grid
    assert grid is not None
    assert grid.slots <= 4
    assert grid.z <= stack_planes
    arrays.write("a", *((t, c, z) for t in range(3) for z in range(7) for c in range(2)))
    arrays.assert_right()
    arrays.trim("a")
    arrays.assert_right()
    assert array.shape == (3, 2, 7, *SHAPE)


def test_a_stack_lies_in_as_few_shards_of_like_size_as_it_can() -> None:
    assert stack_shards(50_000_000, stack_planes=20) == (1, 10)  # 10 planes fit: two shards
    assert stack_shards(50_000_000, stack_planes=11) == (1, 6)
    assert stack_shards(50_000_000, stack_planes=3) == (3, 3)
    assert stack_shards(50_000_000, stack_planes=1) == (10, 1)
    assert stack_shards(600_000_000, stack_planes=4) == (1, 1)


def stack_shards(plane_bytes: int, stack_planes: int) -> tuple[int, int]:
    grid = Grid.for_planes((1, plane_bytes), "uint8", stack_planes)
    return grid.t, grid.z


@pytest.mark.parametrize("shape", [(70, 64), (200, 200)])
def test_a_plane_as_large_as_a_shard_or_larger_has_one_of_its_own(
    arrays: Arrays, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * disk.PAGE)
    array = arrays.add("a", shape)
    assert array.grid is not None
    assert array.grid.slots == 1
    arrays.write("a", (1, 0, 0), (0, 0, 0), (4, 0, 2))
    arrays.assert_right()


@pytest.mark.parametrize("shape", [(1, 1), SHAPE, PAGE_SHAPE])
def test_an_index_fits_into_one_page(arrays: Arrays, shape: tuple[int, int]) -> None:
    array = arrays.add("a", shape)
    grid = array.grid
    assert grid is not None
    assert grid.slots == MAX_SLOTS
    assert grid.index_offset % disk.PAGE == 0
    assert grid.file_bytes - grid.index_offset <= disk.PAGE
    arrays.write("a", (0, 0, 0), (254, 0, 0), (255, 0, 0))
    arrays.assert_right()


@pytest.mark.usefixtures("small_shards")
def test_the_shape_grows_by_a_shard_before_its_first_plane_and_is_cut_at_the_end(
    arrays: Arrays, faulty: FaultyOs
) -> None:
    array = arrays.add("a")
    seen: list[tuple[str, int]] = []

    def look(call: Call) -> Any:
        if call.path.name.startswith("c.") and call.name == "replace":
            seen.append((call.path.name, zarr.open_array(call.path.parent, mode="r").shape[0]))
        return call.do()

    faulty.rule = look
    arrays.write("a", (0, 0, 0))
    assert array.shape[0] == 1, "a single plane needs no block"
    arrays.write("a", (1, 0, 0), (3, 0, 0), (4, 0, 0))
    array.prepare_next(4, 0, 0)
    assert seen == [("c.0.0.0.0.0", 1), ("c.1.0.0.0.0", 8), ("c.2.0.0.0.0", 8)]
    arrays.trim("a")
    assert array.shape[0] == 5
    arrays.assert_right()
    assert len(list(array.shard_files())) == 2, "the one made ahead is gone"
    arrays.write("a", (8, 0, 0))
    arrays.assert_right()


def test_a_shard_takes_the_room_of_its_planes(arrays: Arrays) -> None:
    array = arrays.add("a", (512, 512))
    arrays.write("a", (0, 0, 0), (200, 0, 0))
    (path,) = array.shard_files()
    assert path.stat().st_size > 100 << 20
    assert path.stat().st_blocks * 512 < 2 << 20


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_could_not_be_begun_is_begun_with_the_next_plane(
    arrays: Arrays, faulty: FaultyOs
) -> None:
    array = arrays.add("a")
    calls = iter(range(100))

    def full(call: Call) -> Any:
        if call.writes and "c.0" in call.path.name:
            if next(calls) == 0:
                return call.do_half()
            raise OSError(errno.ENOSPC, "No space left on device")
        return call.do()

    faulty.rule = full
    with pytest.raises(OSError, match="No space left"):
        array.write(0, 0, 0, array.stage(plane((0, 0, 0))))
    faulty.rule = Call.do
    arrays.write("a", (1, 0, 0))
    arrays.assert_right()


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_index_is_neither_trusted_nor_begun_anew(arrays: Arrays) -> None:
    array = arrays.add("a")
    arrays.write("a", (0, 0, 0), (1, 0, 0))
    (path,) = array.shard_files()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    arrays.reopen()
    with pytest.raises(OSError, match="index is damaged; run refocus recover"):
        arrays.write("a", (2, 0, 0))
    assert path.read_bytes() == content
    assert array.grid is not None
    assert shards.repair_index(path, array.grid, (0, 1))
    assert not shards.repair_index(path, array.grid, (0, 1))
    arrays.write("a", (2, 0, 0))
    arrays.assert_right()


def test_what_lies_outside_the_shape_or_the_file_is_no_plane(arrays: Arrays) -> None:
    array = arrays.add("a")
    assert array.read(0, 0, 0) is None
    arrays.write("a", (3, 0, 0))
    assert array.read(0, 0, 0) is not None, "a hole reads as black: the journal says what is there"
    with pytest.raises(RunError, match="does not hold t900/c0/z0"):
        array.read(900, 0, 0)


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
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 << 20)
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


PLACES = st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 6))
STEPS = st.lists(
    st.one_of(
        PLACES.map(lambda place: ("write", place)),
        PLACES.map(lambda place: ("next", place)),
        st.sampled_from([("reopen", (0, 0, 0)), ("trim", (0, 0, 0))]),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), SHAPE, PAGE_SHAPE, (70, 64)]),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    stack_planes=st.integers(1, 9),
    pages=st.integers(1, 12),
    max_open=st.integers(1, 4),
    steps=STEPS,
)
def test_any_sequence_of_writes_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    dtype: str,
    stack_planes: int,
    pages: int,
    max_open: int,
    steps: Iterable[tuple[str, Place]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", pages * disk.PAGE)
        patch.setattr(shards, "MAX_OPEN", max_open)
        arrays = Arrays(tmp_path_factory.mktemp("arrays"))
        arrays.add("a", shape, dtype, stack_planes)
        for what, place in steps:
            match what:
                case "write" if place not in arrays.written["a"]:
                    arrays.write("a", place)
                case "next":
                    arrays.arrays["a"].prepare_next(*place)
                case "reopen":
                    arrays.reopen()
                case "trim" if arrays.written["a"]:
                    arrays.trim("a")
        arrays.assert_right()
        arrays.shards.close()
