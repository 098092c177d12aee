"""Planes in their slots: in any order, of any form, and read by others at once."""

import errno
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zarr
from faulty_os import Call, FaultyOs
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_arrays import Arrays, Place, plane
from store_runs import SHAPE

from refocus.errors import RunError
from store import disk, shards
from store.grid import MAX_SLOTS, Grid, repair_index

PAGE_SHAPE = (32, 64)
"""A plane of uint16 that fills a page exactly."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four pages."""
    monkeypatch.setattr("store.grid.SHARD_BYTES", 4 * disk.PAGE)


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
    monkeypatch.setattr("store.grid.SHARD_BYTES", 3 * disk.PAGE)
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
    assert repair_index(path, array.grid, (0, 1))
    assert not repair_index(path, array.grid, (0, 1))
    arrays.write("a", (2, 0, 0))
    arrays.assert_right()


def test_what_lies_outside_the_shape_or_the_file_is_no_plane(arrays: Arrays) -> None:
    array = arrays.add("a")
    assert array.read(0, 0, 0) is None
    arrays.write("a", (3, 0, 0))
    assert array.read(0, 0, 0) is not None, "a hole reads as black: the journal says what is there"
    with pytest.raises(RunError, match="does not hold t900/c0/z0"):
        array.read(900, 0, 0)


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
        patch.setattr("store.grid.SHARD_BYTES", pages * disk.PAGE)
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
