"""A killed run and a sealed one, for tests that damage them and recover."""

import shutil
from pathlib import Path

import pytest
import short_run
from store_runs import start

from store import durable

ARRAYS = ("0/0/zarr.json", "1/0/zarr.json", "2/0/zarr.json", "3/0/zarr.json")
METADATA = (
    *ARRAYS,
    "0/zarr.json",
    "1/zarr.json",
    "2/zarr.json",
    "3/zarr.json",
    "OME/zarr.json",
    "OME/METADATA.ome.xml",
    "zarr.json",
)


def make_killed_and_sealed(folder: Path) -> Path:
    """The short run in *folder*/killed, as its writer had it after the last frame, and sealed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.grid.SHARD_BYTES", short_run.SHARD_BYTES)
        patch.setattr(durable, "PAUSE_S", 3600.0)  # no mark among the records
        run = start(folder / "sealed", pixel_um=0.1)
        generator = run.note_generator("hash", "identity", "1", "numpy")
        for seq in range(len(short_run.FRAMES)):
            short_run.write_frame(run, seq, generator, lambda _: None)
        shutil.copytree(folder / "sealed", folder / "killed")
        run.close(complete=True, expected_frames=len(short_run.FRAMES), note="by hand")
    return folder


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
