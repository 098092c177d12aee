"""Slides larger than memory: cut where nobody can see it, at a price that does not grow."""

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from engine import apply, tiff_reader, tiff_writer
from engine.apply import refocus_file
from engine.package import SHIPPED, Package, load
from engine.runtimes.openvino import OpenVino
from engine.scaling import derive
from engine.tiles import spans
from refocus.errors import RejectedError
from tests import identity_package

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def runtime() -> Iterator[OpenVino]:
    opened = OpenVino(threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    folder = tmp_path_factory.mktemp("packages")
    return {
        "identity": identity_package.make(folder / "identity"),
        "unet": identity_package.make_unet(folder / "unet"),
    }


def test_spans_cover_all_and_see_far_enough() -> None:
    for length in (*range(1, 300, 7), 1000, 1024):
        for core, halo, stride in ((64, 32, 16), (96, 0, 32), (16, 48, 16)):
            cut = spans(length, core, halo, stride)
            assert [span.start for span in cut] == [0, *(span.stop for span in cut[:-1])]
            assert cut[-1].stop == length
            sizes = {-(-(span.read_stop - span.read_start) // stride) for span in cut}
            assert len(sizes) == 1
            for span in cut:
                assert span.read_start % stride == 0
                assert span.read_start <= max(0, span.start - halo)
                assert span.read_stop >= min(length, span.stop + halo)


def in_tiles_and_whole(
    source: Path, package: Package, runtime: OpenVino, patch: pytest.MonkeyPatch
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Answers to *source*: cut into tiles of 64² in bands of 100 KiB, and not cut."""
    folder = source.parent
    refocus_file(source, folder / "whole.tif", package, runtime)
    for module in (apply, tiff_writer):
        patch.setattr(module, "WHOLE_PX", 100**2)
    patch.setattr(tiff_writer, "_TILE_PX", 32)
    patch.setattr(apply, "CORE_PX", 64)
    patch.setattr(apply, "BAND_BYTES", 400 * 2 * 2 * (64 + 2 * 64))
    refocus_file(source, folder / "tiles.tif", package, runtime)
    with tifffile.TiffFile(folder / "tiles.tif") as tif:
        assert tif.pages.first.is_tiled
        return tif.asarray(), tifffile.imread(folder / "whole.tif")


@pytest.mark.parametrize("layout", ["grey", "tiles", "yxs", "syx", "big strips"])
def test_tiles_show_nowhere(
    layout: str,
    tmp_path: Path,
    packages: dict[str, Package],
    runtime: OpenVino,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    y, x = np.mgrid[:331, :387]
    rgb = (2000 + 900 * np.sin(y / 9) * np.sin(x / 7))[..., None] * (1, 0.7, 0.4)
    rgb = RNG.poisson(rgb + 3000).astype(np.uint16)
    pixels, options = {
        "grey": (rgb[..., 0], {}),
        "tiles": (rgb[..., 0], {"tile": (48, 80), "compression": "zlib"}),
        "big strips": (rgb[..., 0], {"rowsperstrip": 50, "compression": "lzw"}),
        "yxs": (rgb, {"photometric": "rgb"}),
        "syx": (rgb.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
    }[layout]
    tifffile.imwrite(tmp_path / "in.tif", pixels, **options)
    tiles, whole = in_tiles_and_whole(tmp_path / "in.tif", packages["unet"], runtime, monkeypatch)
    difference = np.abs(tiles.astype(float) - whole)
    assert difference.max() <= 0.005 * np.ptp(whole)
    assert np.abs(whole.astype(float) - pixels).mean() > 0.02 * np.ptp(pixels)


def test_tiles_of_the_shipped_generator_show_nowhere(
    tmp_path: Path, runtime: OpenVino, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, x = np.mgrid[:431, :587]
    cells = 200 + 3000 * np.clip(np.sin(y / 19) * np.sin(x / 17), 0, 1) ** 2
    tifffile.imwrite(tmp_path / "in.tif", RNG.poisson(cells).astype(np.uint16))
    package = load(SHIPPED / "fluorescence")
    tiles, whole = in_tiles_and_whole(tmp_path / "in.tif", package, runtime, monkeypatch)
    assert np.abs(tiles.astype(float) - whole).max() <= 0.005 * np.ptp(whole)


def test_too_small_a_halo_would_show(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees what it is there to see."""
    near = identity_package.make_unet(tmp_path / "near", halo_px=16)
    tifffile.imwrite(tmp_path / "in.tif", RNG.poisson(3000, (331, 387)).astype(np.uint16))
    tiles, whole = in_tiles_and_whole(tmp_path / "in.tif", near, runtime, monkeypatch)
    assert np.abs(tiles.astype(float) - whole).max() > 0.02 * np.ptp(whole)


def test_what_looks_at_the_whole_plane_gets_whole_planes_only(
    tmp_path: Path, runtime: OpenVino, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = identity_package.make(tmp_path / "whole", halo_px=None)
    pixels = RNG.integers(100, 4000, (120, 150), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "in.tif", pixels)
    refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", package, runtime)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), pixels)
    monkeypatch.setattr(apply, "WHOLE_PX", 100**2)
    with pytest.raises(RejectedError, match=r"150 x 120 px is too large .* cannot work in tiles"):
        refocus_file(tmp_path / "in.tif", tmp_path / "tiles.tif", package, runtime)
    assert not (tmp_path / "tiles.tif").exists()


def test_bands_fit_whatever_tiles_the_source_has(
    tmp_path: Path, packages: dict[str, Package], runtime: OpenVino, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = RNG.integers(100, 4000, (2100, 600), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "in.tif", pixels, tile=(2048, 2048), compression="zlib")
    for module in (apply, tiff_writer):
        monkeypatch.setattr(module, "WHOLE_PX", 100**2)
    monkeypatch.setattr(apply, "BAND_BYTES", 2 << 20)
    halo = packages["identity"].manifest.halo_px
    with tiff_reader.open_tiff(tmp_path / "in.tif") as tif:
        rows, _ = apply._core(tiff_reader.layers(tif)[0][0], 16, halo)
    assert 2 * (rows + halo) * pixels[0].nbytes <= 2 << 20
    refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", packages["identity"], runtime)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), pixels)


def test_a_scaling_is_derived_without_keeping_what_was_decoded(tmp_path: Path) -> None:
    """12 planes of 8 MiB in a strip each: some of them at once, never all."""
    page = np.tile(RNG.integers(100, 4000, (256, 2048), dtype=np.uint16), (8, 1))
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        for _ in range(12):
            writer.write(page, compression="zlib", rowsperstrip=2048, metadata=None)
    with tiff_reader.open_tiff(tmp_path / "in.tif") as tif:
        found, _ = tiff_reader.layers(tif)
        tracemalloc.start()
        try:
            scalings = apply._scalings(found)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert list(scalings.values()) == [derive([page])]
    assert peak < 6 * page.nbytes


def test_an_image_in_one_huge_compressed_strip_is_rejected(
    tmp_path: Path,
    packages: dict[str, Package],
    runtime: OpenVino,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side = 1024
    tifffile.imwrite(
        tmp_path / "in.tif",
        np.zeros((side, side), np.uint16),
        compression="zlib",
        rowsperstrip=side,
    )
    monkeypatch.setattr(tiff_reader, "MAX_SEGMENT_MIB", 1)
    with pytest.raises(RejectedError, match="holds 2 MiB, at most 1 are decoded"):
        refocus_file(tmp_path / "in.tif", tmp_path / "out.tif", packages["identity"], runtime)


MEMORY = """
import sys
from pathlib import Path
from engine.apply import refocus_file
from engine.package import load
from engine.runtimes.openvino import OpenVino
source, target, folder = map(Path, sys.argv[1:])
runtime = OpenVino(threads=1)
refocus_file(source, target, load(folder), runtime)
(line,) = (l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
print(int(line.split()[1]) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_slide(tmp_path: Path, packages: dict[str, Package]) -> None:
    """9000² pixels are 155 MiB, 309 MiB as float32; refocused whole they would take over 1 GiB."""
    side, peak_mib = 9000, {}
    tile = RNG.integers(100, 4000, (512, 512), dtype=np.uint16)
    for rows in (2048, side):
        source, target = tmp_path / f"{rows}.tif", tmp_path / f"out{rows}.tif"
        tiles = iter([tile] * (-(-rows // 512) * -(-side // 512)))
        tifffile.imwrite(source, tiles, shape=(rows, side), dtype=tile.dtype, tile=tile.shape)
        arguments = [str(source), str(target), str(packages["identity"].folder)]
        child = [sys.executable, "-c", MEMORY, *arguments]
        done = subprocess.run(child, capture_output=True, text=True, check=True)
        peak_mib[rows] = int(done.stdout)
    assert peak_mib[side] < 512
    assert peak_mib[side] - peak_mib[2048] < 128
    np.testing.assert_array_equal(tifffile.imread(target), tifffile.imread(source))
