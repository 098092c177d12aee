"""Small runs for the tests of store: frames whose pixels are known from their seq alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refocus.frame import Frame, FrameHeader, Pixels
from store.layout import RunInfo
from store.writer import RunWriter

SHAPE = (24, 37)


def pixels(seq: int, shape: tuple[int, int] = SHAPE, dtype: str = "uint16") -> Pixels:
    """Noise that differs from frame to frame; read-only, as a frame's pixels are."""
    noise = np.random.default_rng(seq).integers(0, 256, shape).astype(dtype)
    noise.flags.writeable = False
    return noise


def frame(
    seq: int,
    axes: dict[str, Any],
    shape: tuple[int, int] = SHAPE,
    dtype: str = "uint16",
    **known: Any,
) -> Frame:
    """A frame at *axes*; *known* are further fields of its header."""
    known.setdefault("channel", str(axes.get("channel", "")))
    header = FrameHeader(run="test", seq=seq, axes=axes, shape=shape, dtype=dtype, **known)
    return Frame(header, pixels(seq, shape, dtype))


def start(path: Path, pixel_um: float | None = None) -> RunWriter:
    """A new run."""
    info = RunInfo(run_id="test", created_wall_ns=1, version="0", pixel_um=pixel_um)
    return RunWriter.create(path, info)


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond *limit* bytes: a write fails as on a full disk."""
    resource = pytest.importorskip("resource", reason="no limit on file sizes on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
