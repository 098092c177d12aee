"""`refocus export`: what readers that nobody here wrote find in the copies."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import pytest
import tifffile
import yaozarrs
import zarr
from store_runs import SHAPE, file_size_limit, frame, pixels, start

from refocus.cli.main import main
from refocus.errors import DiskError, RunError, SettingsError
from refocus.frame import RefocusOutcome
from store import export_tiff
from store.export import export
from store.layout import RunInfo
from store.pyramid import halved
from store.recover import recover
from store.writer import Provenance, RunWriter

BEGIN_NS = 1_795_000_000_123_456_000
T, C, Z = 3, 2, 4
PLANES = T * C * Z


def seq_of(t: int, c: int, z: int) -> int:
    return (t * C + c) * Z + z


def write(path: Path, *, shape: tuple[int, int] = SHAPE, twins: int = PLANES - 3) -> RunWriter:
    """Three time points of a z-stack in two channels; the last planes have no twin."""
    settings = {"channels": {"FITC": {"emission_nm": 519.0}}}
    info = RunInfo(run_id="id", created_wall_ns=1, version="0", pixel_um=0.325, settings=settings)
    writer = RunWriter.create(path, info)
    number = writer.note_generator("0123456789abcdef", "fluorescence", "1.2", "openvino")
    writer.note_scaling("DAPI", 100.0, 900.0)
    for seq in range(PLANES):
        (t, c), z = divmod(seq // Z, C), seq % Z
        taken = frame(
            seq,
            {"time": t, "channel": ("DAPI", "FITC")[c], "z": z},
            shape,
            wall_time_ns=BEGIN_NS + t * 2_000_000_000 + (seq % (C * Z)) * 50_000_000,
            exposure_ms=40.0 + c,
            x_um=-12.5,
            y_um=7.25,
            z_um=100 + 1.5 * z,
            bit_depth=12,
        )
        writer.write_raw(taken, {})
        if seq < twins:
            made = Provenance(generator=number, latency_ns=1)
            writer.write_refocused(seq, pixels(1000 + seq, shape), made)
        else:
            writer.book_refocus(seq, RefocusOutcome.SKIPPED, "busy")
    return writer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run").close(complete=True, expected_frames=PLANES)
    return tmp_path / "run"


def stack(first_seq: int, planes: int = PLANES) -> np.ndarray[Any, Any]:
    """(t, c, z, y, x); zeros beyond the first *planes*."""
    there = [pixels(first_seq + seq) if seq < planes else np.zeros(SHAPE) for seq in range(PLANES)]
    return np.stack(there).reshape(T, C, Z, *SHAPE)


def test_ome_tiff_as_tifffile_and_ome_types_read_it(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", "ome-tiff")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "run_raw.ome.tif",
        "run_refocused.ome.tif",
    ]
    for image, first, planes in zip(done.images, (0, 1000), (PLANES, PLANES - 3), strict=True):
        with tifffile.TiffFile(image.path) as file:
            (series,) = file.series
            assert (series.axes, series.shape) == ("TCZYX", (T, C, Z, *SHAPE))
            assert series.dtype == np.uint16
            np.testing.assert_array_equal(series.asarray(), stack(first, planes))
            xml = file.ome_metadata
            assert file.pages.first.tags["XResolution"].value == (
                400_000,
                13,
            )  # per cm: 1 / 0.325 um
        assert xml is not None
        ome_types.validate_xml(xml)
        _check_metadata(ome_types.from_tiff(image.path).images[0])


def _check_metadata(image: Any) -> None:
    known = image.pixels
    assert (known.size_t, known.size_c, known.size_z) == (T, C, Z)
    assert (known.physical_size_x, known.physical_size_x_unit.value) == (0.325, "µm")
    assert (known.physical_size_y, known.physical_size_y_unit.value) == (0.325, "µm")
    assert (known.physical_size_z, known.physical_size_z_unit.value) == (1.5, "µm")
    assert (known.time_increment, known.time_increment_unit.value) == (2.0, "s")
    assert known.significant_bits == 12
    assert [channel.name for channel in known.channels] == ["DAPI", "FITC"]
    assert [channel.color.as_rgb_tuple() for channel in known.channels] == [
        (0, 0, 255),
        (0, 255, 0),
    ]
    assert [channel.emission_wavelength for channel in known.channels] == [None, 519.0]
    begun = np.datetime64(image.acquisition_date.isoformat())
    assert begun == np.datetime64(BEGIN_NS, "ns").astype("datetime64[us]")
    plane = known.planes[seq_of(1, 1, 2)]
    assert (plane.the_t, plane.the_c, plane.the_z) == (1, 1, 2)
    assert plane.delta_t == pytest.approx(2.0 + 6 * 0.05)
    assert (plane.exposure_time, plane.exposure_time_unit.value) == (41.0, "ms")
    assert (plane.position_x, plane.position_y, plane.position_z) == (-12.5, 7.25, 103.0)
    assert plane.position_z_unit.value == "µm"
    assert len(known.planes) == PLANES


def group(path: Path) -> Any:
    """An image as zarr reads it."""
    return zarr.open_group(path, mode="r")


def annotation(ome: Any) -> dict[str, Any]:
    """What `export` notes beside the OME model."""
    (known,) = ome.structured_annotations.map_annotations
    return {entry.k: entry.value for entry in known.value.ms}


def test_what_is_computed_and_what_is_absent_is_labelled(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", "ome-tiff")
    raw, refocused = done.images
    absent = ((2, 1, 1), (2, 1, 2), (2, 1, 3))
    assert (raw.planes, raw.absent) == (PLANES, ())
    assert (refocused.planes, refocused.absent) == (PLANES - 3, absent)

    ome = ome_types.from_tiff(refocused.path)
    assert ome.images[0].name == "run refocused (computed)"
    assert ome.images[0].description is not None
    assert "fluorescence 1.2 (0123456789ab)" in ome.images[0].description
    assert "3 of 24 planes are absent" in ome.images[0].description
    assert [plane.delta_t for plane in ome.images[0].pixels.planes[-3:]] == [None] * 3
    told = annotation(ome)
    assert told["computed"] == "true"
    assert json.loads(told["absent_planes"]) == [list(slot) for slot in absent]
    assert json.loads(told["generators"])[0]["package_sha256"] == "0123456789abcdef"
    assert json.loads(told["scaling"]) == {"DAPI": {"offset": 100.0, "scale": 900.0}}

    ome = ome_types.from_tiff(raw.path)
    assert ome.images[0].name == "run raw"
    assert annotation(ome)["computed"] == "false"
    assert "generators" not in annotation(ome)


def test_ome_zarr_0_4_as_others_read_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.ome.zarr"
    export(run, out, "ome-zarr-0.4")
    yaozarrs.validate_zarr_store(str(out))
    for number in range(2):
        yaozarrs.validate_zarr_store(str(out / str(number)))
    raw, refocused = (group(out / str(number)) for number in range(2))
    np.testing.assert_array_equal(raw["0"][:], stack(0))
    np.testing.assert_array_equal(refocused["0"][:], stack(1000, PLANES - 3))
    assert (out / "1/0/2/1/0").is_dir()
    assert not (out / "1/0/2/1/1").exists(), "an absent plane is a chunk that is not there"

    attributes = refocused.attrs.asdict()
    (multiscale,) = attributes["multiscales"]
    assert multiscale["version"] == "0.4"
    assert multiscale["name"] == "run refocused (computed)"
    (dataset,) = multiscale["datasets"]
    assert dataset["coordinateTransformations"] == [
        {"type": "scale", "scale": [2.0, 1.0, 1.5, 0.325, 0.325]}
    ]
    assert [axis.get("unit") for axis in multiscale["axes"]] == [
        "second", None, "micrometer", "micrometer", "micrometer",
    ]  # fmt: skip
    assert [channel["label"] for channel in attributes["omero"]["channels"]] == ["DAPI", "FITC"]
    assert attributes["refocus"]["computed"] is True
    assert attributes["refocus"]["absent_planes"] == [[2, 1, 1], [2, 1, 2], [2, 1, 3]]

    xml = (out / "OME" / "METADATA.ome.xml").read_text(encoding="utf-8")
    ome_types.validate_xml(xml)
    images = ome_types.from_xml(xml).images
    assert [image.name for image in images] == ["run raw", "run refocused (computed)"]
    for image in images:
        _check_metadata(image)


def test_ome_zarr_opens_in_napari_and_has_its_pyramid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.pyramid.SMALLEST_PX", 10)
    writer = start(tmp_path / "run", pixel_um=0.5)
    writer.write_raw(frame(0, {"channel": "DAPI"}), {})
    writer.close(complete=True, expected_frames=1)
    out = tmp_path / "copy.ome.zarr"
    done = export(tmp_path / "run", out, "ome-zarr-0.4", compression="zlib")
    assert done.notes == ("the run has no refocused plane; no refocused image is in the export",)
    copy = group(out / "0")
    first, second = halved(pixels(0)), halved(halved(pixels(0)))
    assert [copy[level].shape[3:] for level in ("0", "1", "2")] == [(24, 37), (12, 19), (6, 10)]
    np.testing.assert_array_equal(copy["1"][0, 0, 0], first)
    np.testing.assert_array_equal(copy["2"][0, 0, 0], second)
    datasets = copy.attrs.asdict()["multiscales"][0]["datasets"]
    assert datasets[2]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, 1.0, 1.0, 2.0, 2.0]},
        {"type": "translation", "translation": [0.0, 0.0, 0.0, 0.75, 0.75]},
    ]

    reader = pytest.importorskip("napari_ome_zarr").napari_get_reader(str(out))
    ((levels, layer, _),) = reader(str(out))
    assert layer["name"] == ["run raw: DAPI"]
    assert [level.shape[-2:] for level in levels] == [(24, 37), (12, 19), (6, 10)]


def test_large_planes_are_tiled_and_carry_a_pyramid(tmp_path: Path) -> None:
    shape = (300, 4100)
    writer = start(tmp_path / "run", pixel_um=0.5)
    for t in range(2):
        writer.write_raw(frame(t, {"time": t}, shape), {})
    writer.close(complete=True, expected_frames=2)
    (image,) = export(
        tmp_path / "run", tmp_path / "out", "ome-tiff", what=("raw",), compression="zlib"
    ).images
    with tifffile.TiffFile(image.path) as file:
        (series,) = file.series
        assert [level.shape[-2:] for level in series.levels] == [
            (300, 4100), (150, 2050), (75, 1025), (38, 513), (19, 257), (10, 129),
        ]  # fmt: skip
        assert file.pages.first.is_tiled
        expected = np.stack([pixels(0, shape), pixels(1, shape)])
        np.testing.assert_array_equal(series.asarray(), expected)
        np.testing.assert_array_equal(series.levels[1].asarray()[1], halved(expected[1]))


def test_a_copy_beyond_4_gb_is_bigtiff(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_tiff, "_BIGTIFF_BYTES", 1000)
    for image in export(run, tmp_path / "out", "ome-tiff", compression="zlib").images:
        with tifffile.TiffFile(image.path) as file:
            assert file.is_bigtiff
            assert file.series[0].asarray().any()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_other_pixel_types(tmp_path: Path, dtype: str) -> None:
    writer = start(tmp_path / "run")
    writer.write_raw(frame(5, {}, dtype=dtype), {})
    writer.close(complete=False, expected_frames=None)
    done = export(tmp_path / "run", tmp_path / "out", "ome-tiff", what=("raw",))
    np.testing.assert_array_equal(
        tifffile.imread(done.images[0].path), pixels(5, dtype=dtype), strict=True
    )
    known = ome_types.from_tiff(done.images[0].path).images[0].pixels
    assert known.type.value == {"uint8": "uint8", "float32": "float"}[dtype]
    assert known.physical_size_x is None
    assert known.time_increment is None
    assert any("pixel size is unknown" in note for note in done.notes)


def test_several_positions_become_files_whose_names_say_so(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    for seq, position in enumerate(("A/1", "A:1", "B\x00µ")):
        writer.write_raw(frame(seq, {"position": position}), {})
    writer.close(complete=True, expected_frames=3)
    done = export(tmp_path / "run", tmp_path / "out", "ome-tiff")
    names = [Path(image.path).name for image in done.images]
    assert names == ["run_0_A-1_raw.ome.tif", "run_1_A-1_raw.ome.tif", "run_2_B-µ_raw.ome.tif"]
    for seq, image in enumerate(done.images):
        np.testing.assert_array_equal(tifffile.imread(image.path), pixels(seq))
    assert ome_types.from_tiff(done.images[2].path).images[0].name == "run B\ufffdµ raw"


def test_uneven_times_have_no_increment_but_their_own_times(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    for t, at_s in enumerate((0, 1, 5)):
        at_ns = BEGIN_NS + at_s * 1_000_000_000
        writer.write_raw(frame(t, {"time": t}, wall_time_ns=at_ns), {})
    writer.close(complete=True, expected_frames=3)
    done = export(tmp_path / "run", tmp_path / "out", "ome-tiff", what=("raw",))
    known = ome_types.from_tiff(done.images[0].path).images[0].pixels
    assert known.time_increment is None
    assert [plane.delta_t for plane in known.planes] == [0.0, 1.0, 5.0]


def test_a_live_and_a_killed_run_are_copied_as_far_as_acknowledged(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    for seq in range(5):
        writer.write_raw(frame(seq, {"time": seq}), {})
    live = export(tmp_path / "run", tmp_path / "live", "ome-tiff", what=("raw",))
    shutil.copytree(tmp_path / "run", tmp_path / "dead")  # what a killed writer leaves behind
    writer.close(complete=True, expected_frames=5)
    killed = export(tmp_path / "dead", tmp_path / "killed", "ome-tiff", what=("raw",))
    assert "the run is live" in live.notes[0]
    assert "the run is incomplete" in killed.notes[0]
    for done in (live, killed):
        assert done.images[0].shape == (5, 1, 1, *SHAPE), "the array's shape runs ahead"
        expected = np.stack([pixels(seq) for seq in range(5)])
        np.testing.assert_array_equal(tifffile.imread(done.images[0].path), expected)


def damage(run: Path, seq: int) -> None:
    """Flip a bit of a raw plane, wherever it lies."""
    plane = pixels(seq).tobytes()
    for path in list((run / "0" / "0").rglob("*")):
        if path.is_file() and (at := path.read_bytes().find(plane)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + 100)
                file.write(bytes([plane[100] ^ 1]))
            return
    raise AssertionError(f"no file holds plane {seq}")


@pytest.mark.parametrize("target", ["ome-tiff", "ome-zarr-0.4"])
def test_a_damaged_plane_is_left_out_and_said(
    run: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run, seq_of(1, 0, 2))
    out = tmp_path / "out.ome.zarr"
    assert main(["export", str(run), "--to", target, "--out", str(out), "--what", "raw"]) == 1
    said = capsys.readouterr().out
    assert "1 plane damaged, zeros: t1/c0/z2" in said
    assert "does not fit its checksum" in said
    expected = stack(0)
    expected[1, 0, 2] = 0
    if target == "ome-tiff":
        path = out / "run_raw.ome.tif"
        np.testing.assert_array_equal(tifffile.imread(path), expected)
        assert annotation(ome_types.from_tiff(path))["damaged_planes"] == "[[1,0,2]]"
    else:
        copy = group(out / "0")
        np.testing.assert_array_equal(copy["0"][:], expected)
        assert copy.attrs.asdict()["refocus"]["damaged_planes"] == [[1, 0, 2]]


def test_an_array_that_cannot_be_read_is_recovered_first(run: Path, tmp_path: Path) -> None:
    (run / "1/0/zarr.json").write_text("{")
    export(run, tmp_path / "raw", "ome-tiff", what=("raw",))
    with pytest.raises(RunError, match=r"1/0/zarr\.json: cannot be read.* run `refocus recover`"):
        export(run, tmp_path / "both", "ome-tiff")
    assert recover(run).lost == 0
    assert not export(run, tmp_path / "both", "ome-tiff").damage


def test_many_damaged_planes_are_told_in_few_lines(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seq in range(PLANES):
        damage(run, seq)
    assert main(["export", str(run), "--to", "ome-tiff", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert f"found: and {PLANES - 8} more" in said
    assert "run `refocus recover`" in said


def test_a_twin_without_its_raw_plane_is_copied(run: Path, tmp_path: Path) -> None:
    damage(run, 3)
    recover(run)
    raw, refocused = export(run, tmp_path / "out", "ome-tiff").images
    assert raw.absent == ((0, 0, 3),)
    assert (0, 0, 3) not in refocused.absent
    np.testing.assert_array_equal(tifffile.imread(refocused.path)[0, 0, 3], pixels(1003))


def test_a_journal_without_the_line_of_a_pair_is_recovered_first(run: Path, tmp_path: Path) -> None:
    lines = run / "journal" / "run.jsonl"
    kept = [line for line in lines.read_bytes().splitlines(True) if b'"kind":"pair"' not in line]
    lines.write_bytes(b"".join(kept))
    with pytest.raises(RunError, match="refocus recover"):
        export(run, tmp_path / "out", "ome-tiff")
    recover(run)
    assert export(run, tmp_path / "out", "ome-tiff").images[0].planes == PLANES


def test_the_command_says_what_it_made(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = str(tmp_path / "new" / "out")
    assert main(["export", str(run), "--to", "ome-tiff", "--out", out, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["format"] == "ome-tiff"
    assert [image["image"] for image in answer["images"]] == ["raw", "refocused"]
    assert answer["images"][1]["absent"] == [[2, 1, 1], [2, 1, 2], [2, 1, 3]]
    assert main(["export", str(run), "--to", "ome-tiff", "--out", out + "2"]) == 0
    said = capsys.readouterr().out
    assert "run_raw.ome.tif: raw, 24 planes of 37x24 px (t 3, c 2, z 4)" in said
    assert "3 planes absent, zeros: t2/c1/z1, t2/c1/z2, t2/c1/z3" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_nothing_is_overwritten_and_nothing_half_made_stays(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with file_size_limit(8192), pytest.raises(RunError, match="nothing is left there"):
        export(run, out, "ome-tiff")
    assert sorted(tmp_path.iterdir()) == [run]
    out.write_text("mine")
    with pytest.raises(SettingsError, match="exists already"):
        export(run, out, "ome-tiff")
    assert out.read_text() == "mine"


def test_places_where_no_copy_can_be(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="inside the run"):
        export(run, run / "copy", "ome-tiff")
    with pytest.raises(SettingsError, match=r"\.ome\.zarr"):
        export(run, tmp_path / "copy", "ome-zarr-0.4")
    assert main(["export", str(tmp_path), "--to", "ome-tiff", "--out", str(tmp_path / "c")]) == 2


def test_a_run_without_a_plane(tmp_path: Path) -> None:
    start(tmp_path / "run").close(complete=True, expected_frames=0)
    with pytest.raises(RunError, match="no raw or refocused plane"):
        export(tmp_path / "run", tmp_path / "out", "ome-tiff")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_said_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskError, match="are free"):
        export(run, tmp_path / "out", "ome-tiff")
    assert sorted(tmp_path.iterdir()) == [run]


def test_what_an_earlier_kill_left_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.0a1b.partial").mkdir()
    done = export(run, tmp_path / "out", "ome-tiff")
    assert any(".out.0a1b.partial: left by" in note for note in done.notes)
