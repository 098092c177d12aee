"""A run on disk, read back by programs that nobody here wrote, at every moment of its life."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import tensorstore
import yaozarrs
import zarr
from store_runs import SHAPE, frame, pixels, start

from refocus.errors import RunError
from refocus.frame import Frame, Pixels, RefocusOutcome
from store.grid import read_index, slots_of
from store.layout import RunInfo
from store.reader import State, open_run
from store.records import Kind
from store.writer import Provenance, RunWriter

AWKWARD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"time": 0, "channel": "DAPI", "z": -1, "position": "A1"}, {"z_um": 9.0}),
    ({"time": 0, "channel": "GFP <µ>", "z": -1, "position": "A1"}, {"z_um": 9.0}),
    ({"time": 0, "channel": "DAPI", "z": 0, "position": "A1"}, {"z_um": 9.5}),
    ({"time": 1, "channel": "DAPI", "z": -1, "position": "A1"}, {"z_um": 9.0}),
    ({"time": 0, "channel": "DAPI", "position": 7}, {"dtype": "uint8"}),
    ({"time": 0, "laser": "488 & more", "angle": -3}, {}),
    ({"time": 0, "channel": "DAPI", "z": 0, "position": "A1"}, {}),  # repeated
    ({"time": 1, "channel": "DAPI", "z": 0, "position": "A1"}, {"shape": (13, 1)}),
    ({"time": 2, "channel": "DAPI", "z": 0, "position": "A1"}, {"pixel_um": 0.25}),
    ({"time": 3, "channel": "DAPI", "position": "A1"}, {"dtype": "float32"}),
    ({"time": 90, "channel": "Cy5", "z": 1, "position": "A1"}, {}),
    ({}, {}),
    ({}, {}),
]
"""Axes and header fields of frames that make a run hard to lay out."""


def awkward_frames() -> Iterator[Frame]:
    for seq, (axes, known) in enumerate(AWKWARD):
        yield frame(seq, axes, **known)


def by_zarr(run: Path, image: int, t: int, c: int, z: int) -> Pixels:
    array = zarr.open_array(run / str(image) / "0", mode="r")
    return np.asarray(array[t, c, z])


def by_tensorstore(run: Path, image: int, t: int, c: int, z: int) -> Pixels:
    kvstore = {"driver": "file", "path": str(run / str(image) / "0")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    return np.asarray(array[t, c, z].read().result())


def test_valid_and_readable_after_every_plane_of_an_awkward_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path, pixel_um=0.1)
    generator = run.note_generator("hash", "identity", "1", "numpy")
    for taken in awkward_frames():
        seq = taken.header.seq
        run.write_raw(taken, {})
        yaozarrs.validate_zarr_store(str(path))
        twin = taken.pixels[::-1]  # not contiguous
        run.write_refocused(seq, twin, Provenance(generator=generator, latency_ns=5))
        yaozarrs.validate_zarr_store(str(path))
        live = open_run(path)
        assert live.state == State.LIVE
        np.testing.assert_array_equal(live.raw(seq), taken.pixels)
        np.testing.assert_array_equal(live.refocused(seq), twin)
    counts = run.close(complete=True, expected_frames=len(AWKWARD))
    yaozarrs.validate_zarr_store(str(path))
    assert (counts.saved, counts.refocused, counts.unanswered) == (len(AWKWARD), len(AWKWARD), 0)

    finished = open_run(path)
    assert finished.state == State.COMPLETE
    for kind in (Kind.RAW, Kind.REFOCUS):
        for record in finished.records(kind):
            wanted = pixels(record.seq, *form(record.seq))[:: 1 if kind == Kind.RAW else -1]
            place = record.image, record.t, record.c, record.z
            np.testing.assert_array_equal(by_zarr(path, *place), wanted, strict=True)
            np.testing.assert_array_equal(by_tensorstore(path, *place), wanted, strict=True)


def form(seq: int) -> tuple[tuple[int, int], str]:
    known = AWKWARD[seq][1]
    return known.get("shape", SHAPE), known.get("dtype", "uint16")


def test_headers_tags_and_notes_come_back(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    written = [run.write_raw(taken, {"Camera": "Demo"}) for taken in awkward_frames()]
    run.book_raw_failed(len(written), "the raw queue was full")
    run.book_refocus(0, RefocusOutcome.REJECTED, "pixel size unknown")
    run.note_scaling("DAPI", 100.0, 900.5)
    run.note_event("worker died", seq=3, exit_code=-9)
    run.close(complete=True, expected_frames=None, note="stopped by hand")

    found = open_run(tmp_path / "run")
    *frames, failed = found.frames()
    assert [entry.header for entry in frames] == written
    assert all(entry.tags == {"Camera": "Demo"} for entry in frames)
    assert failed.header is None
    assert failed.raw is not None
    assert found.reason(failed.raw) == "the raw queue was full"
    assert frames[0].refocus is not None
    assert found.reason(frames[0].refocus) == "pixel size unknown"
    assert found.notes.scalings["DAPI"].scale == 900.5
    assert [(e.event, e.fields) for e in found.notes.events] == [
        ("worker died", {"seq": 3, "exit_code": -9})
    ]
    assert found.state == State.INCOMPLETE  # a frame failed, whatever `complete` said
    assert found.notes.seal is not None
    assert found.notes.seal.note == "stopped by hand"
    assert {line.name for line in found.notes.pairs.values()} >= {"A1", "A1, segment 1", "7"}


def test_tags_that_json_cannot_hold_cost_nothing(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    odd = {"gain": float("nan"), "roi": np.arange(4), "device": object(), "text": "\ud800\n"}
    run.write_raw(frame(0, {"time": 0, "channel": "\udfff", "z": 1.5}, z_um=float("inf")), odd)
    run.close(complete=True, expected_frames=1)
    (entry,) = open_run(tmp_path / "run").frames()
    assert entry.tags["gain"] == "nan"
    assert entry.tags["roi"] == [0, 1, 2, 3]
    assert entry.header is not None
    assert entry.header.z_um is None
    assert entry.header.axes["z"] == "1.5"
    yaozarrs.validate_zarr_store(str(tmp_path / "run"))


def test_a_black_plane_is_stored_and_a_missing_one_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    black = frame(0, {"time": 0})
    run.write_raw(Frame(black.header, np.zeros(SHAPE, np.uint16)), {})
    run.write_raw(frame(1, {"time": 2}), {})
    run.close(complete=True, expected_frames=2)
    found = open_run(path)
    array = found.array(0)
    assert array.grid is not None
    index = read_index(array.shard_file(0, 0, 0), array.grid)
    assert index is not None
    assert slots_of(index) == {0, 2}
    assert not np.any(found.raw(0))
    assert found.raw(2) is None
    assert found.refocused(0) is None
    assert zarr.open_array(path / "0" / "0", mode="r").shape == (3, 1, 1, *SHAPE)
    assert zarr.open_array(path / "1" / "0", mode="r").shape == (3, 1, 1, *SHAPE)


def group(image: Path) -> dict[str, Any]:
    """OME attributes of an image group."""
    ome: dict[str, Any] = json.loads((image / "zarr.json").read_bytes())["attributes"]["ome"]
    return ome


def test_sizes_names_and_steps_are_said_where_known(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    for seq, (z, name) in enumerate([(0, "DAPI"), (0, "GFP"), (1, "DAPI"), (2, "DAPI")]):
        known = {"z_um": 100 + 0.4 * z, "pixel_um": 0.108, "bit_depth": 12}
        run.write_raw(frame(seq, {"z": z, "channel": name, "position": "A&B"}, **known), {})
    run.write_raw(frame(9, {"z": 0, "channel": "dark", "position": "unknown"}), {})
    run.close(complete=False, expected_frames=None)

    raw, twin, unknown = (group(path / n) for n in "012")
    (multiscale,) = raw["multiscales"]
    assert multiscale["name"] == "A&B raw"
    scale = multiscale["datasets"][0]["coordinateTransformations"]
    assert scale == [{"type": "scale", "scale": [1, 1, 0.4, 0.108, 0.108]}]
    assert [axis.get("unit") for axis in multiscale["axes"]][2:] == ["micrometer"] * 3
    channels = raw["omero"]["channels"]
    assert [(c["label"], c["color"]) for c in channels] == [("DAPI", "0000FF"), ("GFP", "00FF00")]
    assert channels[0]["window"]["max"] == 4095
    assert twin["multiscales"][0]["name"] == "A&B refocused"
    assert twin["omero"]["channels"] == channels
    assert all("unit" not in axis for axis in unknown["multiscales"][0]["axes"])

    root = ElementTree.parse(path / "OME" / "METADATA.ome.xml").getroot()
    images = root.findall("{*}Image")
    assert [i.get("Name") for i in images[:2]] == ["A&B raw", "A&B refocused"]
    sizes = images[0].find("{*}Pixels")
    assert sizes is not None
    assert {k: sizes.get(f"Size{k}") for k in "TCZ"} == {"T": "1", "C": "2", "Z": "3"}
    assert (sizes.get("PhysicalSizeX"), sizes.get("PhysicalSizeZ")) == ("0.108", "0.4")


NAPARI = """
import json, sys
from napari_ome_zarr._reader import napari_get_reader
layers = napari_get_reader(sys.argv[1])(sys.argv[1])
print(json.dumps([[str(data[0].dtype), meta["name"]] for data, meta, *_ in layers]))
"""


def test_napari_opens_the_root_of_a_live_run(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    for seq, position in enumerate(("A", "B")):
        run.write_raw(frame(seq, {"time": 0, "channel": "GFP", "position": position}), {})
    # In a process of its own: importing napari warns, and starts threads.
    answer = subprocess.run(
        [sys.executable, "-c", NAPARI, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    run.close(complete=True, expected_frames=2)
    layers = json.loads(answer.stdout.splitlines()[-1])
    assert [name for _, (name,) in layers] == [
        "A raw: GFP",
        "A refocused: GFP",
        "B raw: GFP",
        "B refocused: GFP",
    ]
    assert {dtype for dtype, _ in layers} == {"uint16"}


def test_an_existing_path_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="exists already"):
        start(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot be made here"):
        RunWriter.create(
            tmp_path / "file" / "run", RunInfo(run_id="x", created_wall_ns=0, version="0")
        )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_without_a_frame_is_a_journal_only(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    assert open_run(tmp_path / "run").state == State.LIVE
    run.close(complete=True, expected_frames=0)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["journal"]
    assert open_run(tmp_path / "run").state == State.EMPTY


@pytest.mark.parametrize(
    ("seqs", "expected", "state"),
    [
        ([0, 1, 2], 3, State.COMPLETE),
        ([2, 0, 1], None, State.COMPLETE),
        ([0, 1], 3, State.INCOMPLETE),
        ([0, 2], None, State.INCOMPLETE),
        ([0, 2], 2, State.INCOMPLETE),
    ],
)
def test_complete_is_said_only_if_the_frames_add_up(
    tmp_path: Path, seqs: list[int], expected: int | None, state: State
) -> None:
    run = start(tmp_path / "run")
    for seq in seqs:
        run.write_raw(frame(seq, {"time": seq}), {})
    run.close(complete=True, expected_frames=expected)
    assert open_run(tmp_path / "run").state == state


def test_what_is_acknowledged_is_never_written_again(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    made = Provenance(generator=run.note_generator("h", "n", "1", "r"), latency_ns=1)
    twin = pixels(100)
    run.write_refocused(0, twin, made)
    with pytest.raises(RunError, match="raw outcome already"):
        run.write_raw(frame(0, {"time": 5}), {})
    with pytest.raises(RunError, match="never written again"):
        run.write_refocused(0, pixels(101), made)
    with pytest.raises(RunError, match="never written again"):
        run.book_refocus(0, RefocusOutcome.LATE, "too late")
    with pytest.raises(RunError, match="nothing to put a twin to"):
        run.write_refocused(1, twin, made)
    counts = run.close(complete=True, expected_frames=1)
    assert msgspec.to_builtins(counts) | {"saved": 1, "refocused": 1} == msgspec.to_builtins(counts)
    np.testing.assert_array_equal(open_run(tmp_path / "run").refocused(0), twin)


class Broken:
    """An object that cannot be made text."""

    def __str__(self) -> str:
        raise ValueError("no text for me")


def test_no_tag_costs_a_plane(tmp_path: Path) -> None:
    endless: dict[str, object] = {"size": 3}
    endless["self"] = [endless, endless]
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {"endless": endless, "broken": Broken(), "Gain": 2})
    run.close(complete=True, expected_frames=1)
    found = open_run(tmp_path / "run")
    np.testing.assert_array_equal(found.raw(0), pixels(0))
    (entry,) = found.frames()
    assert entry.tags == {
        "endless": "(left out: dict cannot be written, RecursionError)",
        "broken": "(left out: Broken cannot be written, ValueError)",
        "Gain": 2,
    }


def test_true_and_false_are_text_on_every_axis(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    taken: list[dict[str, Any]] = [
        {key: value} for key in ("time", "z", "position", "shutter") for value in (True, 1, False)
    ]
    for seq, axes in enumerate(taken):
        run.write_raw(frame(seq, axes), {})
    run.close(complete=True, expected_frames=len(taken))
    found = open_run(tmp_path / "run")
    assert found.state == State.COMPLETE
    assert not found.notes.unreadable
    for axes, entry in zip(taken, found.frames(), strict=True):
        np.testing.assert_array_equal(found.raw(entry.seq), pixels(entry.seq))
        assert entry.header is not None
        ((key, value),) = axes.items()
        assert entry.header.axes == {key: value if type(value) is int else str(value)}


def test_planes_of_another_form_are_refused_and_booked(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    good = frame(0, {"time": 0})
    with pytest.raises(RunError, match=r"uint8 .* the header says uint16"):
        run.write_raw(Frame(frame(1, {"time": 1}).header, pixels(1, dtype="uint8")), {})
    run.write_raw(good, {})
    made = Provenance(generator=1, latency_ns=1)
    with pytest.raises(RunError, match="raw is uint16"):
        run.write_refocused(0, pixels(0, (3, 3)), made)
    counts = run.close(complete=True, expected_frames=2)
    assert (counts.saved, counts.failed, counts.refocus_failed) == (1, 1, 1)
