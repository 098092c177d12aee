"""`refocus apply`: same name, shape, dtype and metadata out, whatever TIFF comes in."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from engine import tiff_reader
from engine.apply import refocus_file
from engine.package import Package
from engine.runtimes.openvino import OpenVino
from engine.scaling import derive
from refocus.cli import apply as command
from refocus.errors import EngineError, PackageError, SettingsError
from tests import identity_package

RNG = np.random.default_rng(0)
GREY = RNG.integers(100, 4000, (6, 70, 91), dtype=np.uint16)
RGB = RNG.integers(0, 255, (70, 93, 3), dtype=np.uint8)
UM = {"resolution": (1e4 / 0.2, 1e4 / 0.2), "resolutionunit": "CENTIMETER"}

OME_XML = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="91" '
    'SizeY="70" SizeC="1" SizeZ="1" SizeT="1" %s><TiffData/></Pixels></Image></OME>'
)

LAYOUTS: dict[str, tuple[npt.NDArray[Any], dict[str, Any]]] = {
    "yx": (GREY[0], {}),
    "uint8": (RGB[..., 0], {}),
    "zyx": (GREY, UM),
    "big-endian": (GREY, {"byteorder": ">"}),
    "strips": (GREY[0], {"compression": "lzw", "predictor": True, "rowsperstrip": 7}),
    "tiles": (GREY, {"tile": (32, 48), "compression": "zlib"}),
    "bigtiff": (GREY, {"bigtiff": True}),
    "one-ifd": (GREY, {"truncate": True}),
    "yxs": (RGB, {"photometric": "rgb"}),
    "zyxs": (np.stack([RGB, RGB[::-1]]), {"photometric": "rgb", "tile": (32, 32)}),
    "syx": (RGB.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
    "syx-tiles": (
        RGB.transpose(2, 0, 1),
        {"photometric": "rgb", "planarconfig": "separate", "tile": (16, 32)},
    ),
    "imagej": (
        GREY.reshape(3, 2, 70, 91),
        {
            "imagej": True,
            "resolution": (5, 5),
            "metadata": {"axes": "ZCYX", "unit": "um", "Labels": list("abcdef"), "Info": "µm"},
        },
    ),
    "ome": (
        GREY.reshape(2, 3, 1, 70, 91),
        {
            "ome": True,
            "metadata": {
                "axes": "CZTYX",
                "PhysicalSizeX": 200,
                "PhysicalSizeXUnit": "nm",
                "Channel": {"Name": ["DAPI", "βIII"]},
            },
        },
    ),
    "micro-manager": (
        GREY[0],
        {"extratags": [(51123, 2, 0, '{"PixelSizeUm": 0.2}', True)], "datetime": True},
    ),
    "tall": (np.arange(2047, dtype=np.uint16)[:, None], {}),
    "pixel": (GREY[0, :1, :1], {}),
}


@pytest.fixture(scope="module")
def runtime() -> Iterator[OpenVino]:
    opened = OpenVino(threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    folder = tmp_path_factory.mktemp("packages")
    return {
        answer: identity_package.make(folder / answer, answer=answer)
        for answer in ("identity", "negated", "constant")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_as_it_was(
    layout: str, tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    pixels, options = LAYOUTS[layout]
    source, target = tmp_path / "in.tif", tmp_path / "out.tif"
    tifffile.imwrite(source, pixels, **options)
    refocus_file(source, target, packages["identity"], runtime)
    with tifffile.TiffFile(source) as old, tifffile.TiffFile(target) as new:
        assert new.asarray().dtype == pixels.dtype
        np.testing.assert_array_equal(new.asarray(), old.asarray())
        assert (new.is_bigtiff, new.byteorder) == (old.is_bigtiff, old.byteorder)
        assert new.ome_metadata == old.ome_metadata
        assert new.imagej_metadata == old.imagej_metadata
        ours, theirs = new.pages.first, old.pages.first
        assert ours.description == theirs.description
        assert ours.resolution == theirs.resolution
        assert ours.resolutionunit == theirs.resolutionunit
        assert ours.photometric == theirs.photometric
        assert ours.chunks == theirs.chunks or not ours.is_tiled
        for code in (306, 51123):
            assert code not in theirs.tags or ours.tags[code].value == theirs.tags[code].value
        if layout != "one-ifd":
            assert len(new.pages) == len(old.pages)
            assert new.series[0].axes == old.series[0].axes


def test_it_is_the_network_that_answers_and_says_so(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    tifffile.imwrite(tmp_path / "in.tif", GREY, **UM)
    package = packages["negated"]
    done = refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", package, runtime)
    scaling = derive(list(GREY))
    assert scaling is not None
    expected = 2 * scaling.offset - GREY.astype(float)
    with tifffile.TiffFile(tmp_path / "out.tif") as new:
        assert np.abs(new.asarray() - np.clip(expected, 0, None)).max() < 0.01 * np.ptp(GREY)
        for page in new.pages:
            assert "computed image" in page.aspage().tags["Software"].value
            assert package.hash in page.aspage().tags["Software"].value
    told = json.loads((tmp_path / "out.tif.refocus.json").read_text())
    assert told["computed"] is True
    assert told["generator_sha256"] == package.hash
    assert told["pixel_um"] == pytest.approx(0.2)
    assert told["planes"] == len(GREY) == done.planes
    assert told["scalings"][0]["scaling"] == {"offset": scaling.offset, "scale": scaling.scale}


def test_channels_have_their_own_scaling_and_rgb_shares_one(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    channels = np.stack([GREY[:3], GREY[3:] // 2, np.zeros_like(GREY[:3])])
    tifffile.imwrite(tmp_path / "c.tif", channels, ome=True, metadata={"axes": "CZYX"})
    tifffile.imwrite(tmp_path / "rgb.tif", RGB // np.uint8([1, 2, 3]), photometric="rgb")
    (first, second, third) = refocus_file(
        tmp_path / "c.tif", tmp_path / "c-out.tif", packages["identity"], runtime
    ).scalings
    assert first.scaling == derive(list(GREY[:3]))
    assert second.scaling == derive(list(GREY[3:] // 2))
    assert third.scaling is None
    done = refocus_file(
        tmp_path / "rgb.tif", tmp_path / "rgb-out.tif", packages["identity"], runtime
    )
    assert [(one.channel, one.sample) for one in done.scalings] == [(0, 0)]


def test_alpha_is_no_picture(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    rgba = np.concatenate([RGB, RGB[..., :1]], axis=2)
    tifffile.imwrite(tmp_path / "in.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", packages["negated"], runtime)
    answer = tifffile.imread(tmp_path / "out.tif")
    np.testing.assert_array_equal(answer[..., 3], rgba[..., 3])
    assert not np.array_equal(answer[..., :3], rgba[..., :3])


def test_of_a_pyramid_the_full_level_is_written(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        jpeg = {"tile": (32, 32), "compression": "jpeg", "photometric": "rgb", "metadata": None}
        writer.write(RGB, subifds=1, **jpeg)
        writer.write(RGB[::2, ::2].copy(), subfiletype=1, **jpeg)
    done = refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", packages["identity"], runtime)
    assert "left out: the smaller levels of the pyramid" in done.notes
    with tifffile.TiffFile(tmp_path / "out.tif") as new:
        assert len(new.pages) == 1
        assert not new.pages.first.subifds
        assert new.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        np.testing.assert_array_equal(new.asarray(), tifffile.imread(tmp_path / "in.tif", level=0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LAYOUTS["ome"][1], 0.2),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.3}}, 0.3),
        ({"ome": True}, None),
        (LAYOUTS["imagej"][1], 0.2),
        ({"imagej": True, "metadata": {"unit": "\\u00B5m"}, "resolution": (4, 4)}, 0.25),
        ({"imagej": True, "metadata": {"unit": "pixel"}, "resolution": (4, 4)}, None),
        (UM, 0.2),
        ({"resolution": (25_400, 25_400), "resolutionunit": "INCH"}, 1.0),
        *[({"resolution": (dpi, dpi), "resolutionunit": "INCH"}, None) for dpi in (72, 600, 2400)],
        ({"resolution": (118, 118), "resolutionunit": "CENTIMETER"}, None),
        ({}, None),
        ({"description": OME_XML % 'PhysicalSizeX="0,2"'}, None),
        ({"description": OME_XML % 'PhysicalSizeX="0.2" PhysicalSizeXUnit="mm"'}, 200.0),
        ({"description": "Aperio Image Library\n|AppMag = 20|MPP = 0.49.90"}, None),
        ({"description": "Aperio Image Library\n|AppMag = 20|MPP = 0.4990"}, 0.499),
    ],
)
def test_pixel_size_is_found(
    tmp_path: Path, options: dict[str, Any], expected: float | None
) -> None:
    pixels = LAYOUTS["ome"][0] if "axes" in options.get("metadata", {}) else GREY[0]
    if options is LAYOUTS["imagej"][1]:
        pixels = LAYOUTS["imagej"][0]
    tifffile.imwrite(tmp_path / "in.tif", pixels, **options)
    with tifffile.TiffFile(tmp_path / "in.tif") as tif:
        assert tiff_reader.pixel_um(tif) == (expected and pytest.approx(expected))


def palette(path: Path) -> None:
    colours = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(path, RGB[..., 0], photometric="palette", colormap=colours)


def cut_off(path: Path, stacked: bool = True, **options: Any) -> None:
    """As after a copy that stopped: the last plane's last bytes are missing."""
    pixels = GREY if stacked else GREY[0]
    tifffile.imwrite(path, pixels, metadata=None, **options)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[len(tif.pages) - 1]
        end = page.dataoffsets[-1] + page.databytecounts[-1]
    path.write_bytes(path.read_bytes()[: end - 10])


BAD = {
    "float": (lambda path: tifffile.imwrite(path, GREY[0].astype("f4")), "pixels are float32"),
    "int16": (lambda path: tifffile.imwrite(path, GREY[0].astype("i2")), "pixels are int16"),
    "bilevel": (lambda path: tifffile.imwrite(path, GREY[0] > 1000), "pixels are bool"),
    "palette": (palette, "colours are PALETTE"),
    "too coarse": (
        lambda path: tifffile.imwrite(path, GREY[0], resolution=(2000, 2000), resolutionunit=3),
        "pixel size 5 um is outside 0.05 to 2 um",
    ),
    "nonsense": (lambda path: path.write_bytes(b"no TIFF at all"), "not a TIFF file"),
    "empty": (lambda path: path.write_bytes(b""), "not a TIFF file"),
    "cut off": (cut_off, "the file is damaged: .*invalid page offset"),
    "cut off in a row": (lambda path: cut_off(path, stacked=False), "the file ends in row"),
    "cut off in a strip": (
        lambda path: cut_off(path, stacked=False, rowsperstrip=9, compression="zlib"),
        "the file ends within tile or strip",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_file_is_named_and_the_rest_is_done(
    kind: str, tmp_path: Path, packages: dict[str, Package], capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = BAD[kind]
    make(tmp_path / "bad.tif")
    tifffile.imwrite(tmp_path / "good.tif", GREY, **UM)
    inputs = [tmp_path / name for name in ("absent.tif", "bad.tif", "good.tif")]
    code = call(inputs, tmp_path / "out", packages["identity"])
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith(f"{tmp_path / 'bad.tif'}: "))
    assert re.search(reason, line)
    assert any("absent.tif: FAILED: FileNotFoundError" in line for line in lines)
    assert lines[-1] == "2 of 3 files not refocused"
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["good.tif", "good.tif.refocus.json"]


def test_an_existing_output_is_left_alone(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    tifffile.imwrite(tmp_path / "in.tif", GREY)
    (tmp_path / "out.tif").write_bytes(b"precious")
    with pytest.raises(SettingsError, match="exists and stays"):
        refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", packages["identity"], runtime)
    assert (tmp_path / "out.tif").read_bytes() == b"precious"


def test_rubbish_leaves_nothing_behind(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino
) -> None:
    tifffile.imwrite(tmp_path / "in.tif", GREY)
    with pytest.raises(EngineError, match="everywhere"):
        refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", packages["constant"], runtime)
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_the_users_pixel_size_wins(
    tmp_path: Path, packages: dict[str, Package], capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "in.tif", GREY, **UM)
    more = ["--pixel-size-um", "7"]
    assert call([tmp_path / "in.tif"], tmp_path / "out", packages["identity"], *more) == 1
    assert "REJECTED: pixel size 7 um is outside" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        call([tmp_path / "in.tif"], tmp_path / "out", packages["identity"], "--pixel-size-um=-1")
    assert usage.value.code == 2
    capsys.readouterr()


def test_what_stops_it_before_the_first_file(tmp_path: Path, packages: dict[str, Package]) -> None:
    tifffile.imwrite(tmp_path / "in.tif", GREY)
    with pytest.raises(SettingsError, match="no folder there"):
        call([tmp_path / "in.tif"], tmp_path / "in.tif", packages["identity"])
    with pytest.raises(SettingsError, match="'none' refocuses nothing"):
        call([tmp_path / "in.tif"], tmp_path / "out", packages["identity"], "--engine", "none")
    altered = identity_package.make(tmp_path / "altered")
    (altered.folder / "golden.npz").write_bytes(b"")
    with pytest.raises(PackageError, match="altered"):
        call([tmp_path / "in.tif"], tmp_path / "out", altered)


def call(inputs: list[Path], out: Path, package: Package, *more: str) -> int:
    """`refocus apply` in this process."""
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    names = [str(path) for path in inputs]
    options = ["--out", str(out), "--generator", str(package.folder), *more]
    arguments = parser.parse_args(["apply", *names, *options])
    return int(arguments.run(arguments))
