"""Readers that nobody here wrote open a run that is live, killed, recovered, sealed or finished.

Every reader must read every acknowledged plane as it was, and nothing but Zarr's fill value, 0,
where no plane was written. Pixels alone cannot tell such a slot from a black plane; the journal
can, and store.reader asks it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import yaozarrs
from foreign_readers import LIBRARIES, Planes, assert_shows, block, library
from foreign_run import BLACK, LAG, PLANNED, TWIN, Slot, Taken, Writer, further

from refocus.frame import Pixels
from store.finish import finish
from store.layout import array_dir
from store.reader import State, open_run
from store.records import Kind
from store.recover import recover


@dataclass
class Written:
    """A run, and what must, or may, be found in each of its images."""

    path: Path
    state: State
    compressed: bool = False
    """By the zarr library, which may leave black planes out."""
    sure: list[dict[Slot, Pixels]] = field(default_factory=list)
    """The acknowledged planes."""
    maybe: list[dict[Slot, Pixels]] = field(default_factory=list)
    """The planes on their way when the writer died."""
    _channels: dict[str, dict[int | str, int]] = field(default_factory=dict)

    def place(self, taken: Taken) -> tuple[int, Slot]:
        """Raw image and slot: pairs are numbered as they appear, and so are a pair's channels."""
        if taken.position not in self._channels:
            self._channels[taken.position] = {}
            self.sure += [{}, {}]
            self.maybe += [{}, {}]
        channels = self._channels[taken.position]
        c = channels.setdefault(taken.axes.get("channel", ""), len(channels))
        slot = int(taken.axes["time"]), c, int(taken.axes.get("z", 0))
        return 2 * list(self._channels).index(taken.position), slot

    def add_raw(self, taken: Taken, *, sure: bool = True) -> None:
        image, slot = self.place(taken)
        (self.sure if sure else self.maybe)[image][slot] = taken.picture()

    def add_twin(self, taken: Taken, *, sure: bool = True) -> None:
        image, slot = self.place(taken)
        if taken.has_twin:
            (self.sure if sure else self.maybe)[image + 1][slot] = taken.picture(twin=True)

    def add_killed(self, last: int) -> None:
        """What a writer leaves that died after it announced frame *last* and before the next."""
        for seq in range(len(PLANNED), last + 1):
            self.add_raw(further(seq))
            if seq - LAG >= len(PLANNED):
                self.add_twin(further(seq - LAG))
        self.add_raw(further(last + 1), sure=False)
        self.add_twin(further(last + 1 - LAG), sure=False)

    def arrays(self) -> Iterator[tuple[Path, Planes, Planes]]:
        """Each array's folder, and the planes that must, and may, be in it."""
        for image, planes in enumerate(zip(self.sure, self.maybe, strict=True)):
            yield array_dir(self.path, image), *planes


@pytest.fixture(scope="module", params=["live", "killed", "recovered", "sealed", "finished"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Written]:
    """The run at one of five moments of its life."""
    run = Written(tmp_path_factory.mktemp(request.param) / "run", State.LIVE)
    for taken in PLANNED:
        run.add_raw(taken)
        run.add_twin(taken)
    writer = Writer(run.path)
    try:
        if request.param in ("sealed", "finished"):
            writer.tell("seal")
            assert writer.hear() == "sealed\n"
            run.state = State.COMPLETE
        if request.param == "finished":
            finish(run.path, compress=True)
            run.compressed = True
        if request.param in ("killed", "recovered"):
            writer.tell("go on")
            said = [writer.hear() for _ in range(20)]
            run.add_killed(int((said + writer.kill())[-1]))
            run.state = State.INCOMPLETE
        if request.param == "recovered":
            recover(run.path)
        yield run
    finally:
        writer.kill()


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_acknowledged_plane_is_right_and_every_other_slot_is_0(
    written: Written, name: str
) -> None:
    with library(name) as read:
        for array, sure, maybe in written.arrays():
            assert_shows(read(array, block(array, sure, maybe)), sure, maybe)


def test_the_run_is_valid_ome_zarr(written: Written) -> None:
    yaozarrs.validate_zarr_store(str(written.path))


NAPARI = """
import json, sys
import numpy as np
from napari_ome_zarr._reader import napari_get_reader
run, out, blocks = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
layers = napari_get_reader(run)(run)
planes = [data[0][:t, :c, :z] for (data, *_), (t, c, z) in zip(layers, blocks, strict=True)]
np.savez(out, *planes)
"""


def test_napari_opens_the_root_and_shows_every_plane(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "layers.npz"
    blocks = [[one.stop for one in block(*array)] for array in written.arrays()]
    # In a process of its own: importing napari warns, and starts threads.
    command = [sys.executable, "-c", NAPARI, str(written.path), str(out), json.dumps(blocks)]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(out) as layers:
        for layer, (_, sure, maybe) in zip(layers.values(), written.arrays(), strict=True):
            assert_shows(layer, sure, maybe)


def test_a_black_plane_is_stored_and_no_plane_is_not(written: Written) -> None:
    """Of the foreign readers tensorstore can be asked which of the two it is."""
    for array, sure, maybe in written.arrays():
        kvstore = {"driver": "file", "path": str(array)}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        for slot in np.ndindex(*(one.stop for one in block(array, sure, maybe))):
            answer = opened[slot].storage_statistics(query_fully_stored=True).result()
            left_out = written.compressed and not np.any(sure.get(slot, 1))
            assert slot in maybe or left_out or answer.fully_stored == (slot in sure)


def test_our_own_reader_tells_absent_from_black(written: Written) -> None:
    run = open_run(written.path)
    assert run.state == written.state
    assert run.counts.saved >= len(PLANNED)
    for taken in PLANNED:
        np.testing.assert_array_equal(run.raw(taken.seq), taken.picture(), strict=True)
        twin = taken.picture(twin=True) if taken.has_twin else None
        np.testing.assert_array_equal(run.refocused(taken.seq), twin, strict=taken.has_twin)
    for seq in BLACK:
        assert not np.any(run.raw(seq))
    assert run.raw(TWIN) is None
    for image, sure in enumerate(written.sure):
        kind = Kind.REFOCUS if image % 2 else Kind.RAW
        present = {(r.t, r.c, r.z) for r in run.records(kind) if r.image == image}
        assert sure.keys() <= present <= sure.keys() | written.maybe[image].keys()
