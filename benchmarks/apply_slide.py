"""How much memory and time a whole slide takes: python benchmarks/apply_slide.py --generator NAME

Writes a slide (tiled BigTIFF) full of cells into a temporary folder, refocuses it by `refocus
apply` in a process of its own, and prints the peak of that process's resident memory and its
speed. Linux and macOS. Needs twice the slide's size on disk: 3.6 GB for 30,000², grey, 16 bits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

TILE_PX = 512


def main() -> None:
    """Make a slide, refocus it, print what it took as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=30_000, help="side of the slide in pixels")
    parser.add_argument("--rgb", action="store_true", help="8-bit RGB instead of 16-bit grey")
    parser.add_argument("--compression", help="of the slide, as tifffile names it")
    parser.add_argument("--generator", default="fluorescence", help="name or folder")
    parser.add_argument("--folder", type=Path, help="where to put the temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        slide = Path(folder) / "slide.tif"
        write_slide(slide, arguments.size, arguments.rgb, arguments.compression)
        out = Path(folder) / "out"
        command = ["-m", "refocus.cli.main", "apply", str(slide), "--out", str(out)]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command, "--generator", arguments.generator])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(process.returncode)
        mpx = arguments.size**2 * (3 if arguments.rgb else 1) / 1e6
        maxrss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        figures = {
            "size_px": arguments.size,
            "rgb": arguments.rgb,
            "peak_mib": round(maxrss_bytes / 2**20),
            "seconds": round(seconds, 1),
            "mpx_per_s": round(mpx / seconds, 2),
            "input_mib": slide.stat().st_size >> 20,
            "output_mib": (out / slide.name).stat().st_size >> 20,
        }
        print(json.dumps(figures))


def write_slide(path: Path, size: int, rgb: bool, compression: str | None) -> None:
    """A tiled BigTIFF of *size* squared pixels, 0.25 um each: blurred discs on a background."""
    dtype, shape = ("uint8", (size, size, 3)) if rgb else ("uint16", (size, size))
    tifffile.imwrite(
        path,
        _tiles(size, rgb),
        shape=shape,
        dtype=dtype,
        tile=(TILE_PX, TILE_PX),
        bigtiff=True,
        photometric="rgb" if rgb else "minisblack",
        compression=compression,
        resolution=(1e4 / 0.25, 1e4 / 0.25),
        resolutionunit="CENTIMETER",
        metadata=None,
        maxworkers=1,
        buffersize=1 << 24,
    )


def _tiles(size: int, rgb: bool) -> Iterator[npt.NDArray[np.generic]]:
    rng = np.random.default_rng(0)
    choice = [_tile(rng, rgb) for _ in range(16)]
    for _ in range((-(-size // TILE_PX)) ** 2):
        yield choice[rng.integers(len(choice))]


def _tile(rng: np.random.Generator, rgb: bool) -> npt.NDArray[np.generic]:
    y, x = np.mgrid[:TILE_PX, :TILE_PX]
    light = np.zeros((TILE_PX, TILE_PX))
    for _ in range(20):
        centre_y, centre_x, radius = rng.uniform((0, 0, 5), (TILE_PX, TILE_PX, 25))
        distance = np.hypot(y - centre_y, x - centre_x)
        light += 1 / (1 + np.exp((distance - radius) / 3))
    if rgb:
        stain = np.exp(-light[..., None] * (0.4, 0.9, 0.3))
        return np.clip(rng.normal(235 * stain, 3), 0, 255).astype(np.uint8)
    return rng.poisson(100 + 2000 * light).astype(np.uint16)


if __name__ == "__main__":
    main()
