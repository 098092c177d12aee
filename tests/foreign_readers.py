"""The libraries that read arrays of a run, each behind the same call, and what they must show."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import tensorstore
import zarr
from foreign_run import Slot

from refocus.frame import Pixels

At = tuple[Any, ...]
"""Indices, or slices, of t, c, z."""
Reader = Callable[[Path, At], Pixels]
"""Opens the array in a folder anew, and reads."""
Planes = Mapping[Slot, Pixels]
ZARRITA = Path(__file__).with_name("zarrita")


def by_zarr(array: Path, at: At) -> Pixels:
    return np.asarray(zarr.open_array(array, mode="r")[at])


def by_tensorstore(array: Path, at: At) -> Pixels:
    kvstore = {"driver": "file", "path": str(array)}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    return np.asarray(opened[at].read().result())


def by_dask(array: Path, at: At) -> Pixels:
    opened = dask.array.from_zarr(str(array))
    return np.asarray(opened[at].compute(scheduler="synchronous"))


class Zarrita:
    """A node process that reads planes (tests/zarrita/read.mjs)."""

    def __init__(self) -> None:
        command = ["node", str(ZARRITA / "read.mjs")]
        self._node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, array: Path, at: At) -> Pixels:
        """As the other readers. Raises ValueError with what zarrita said."""
        node = self._node
        assert node.stdin is not None
        assert node.stdout is not None
        axes = [[one.start, one.stop] if isinstance(one, slice) else one for one in at]
        request = {"array": str(array), "at": axes + [None] * (5 - len(axes))}
        node.stdin.write(json.dumps(request).encode() + b"\n")
        node.stdin.flush()
        answer = json.loads(node.stdout.readline())
        if "error" in answer:
            raise ValueError(f"zarrita: {answer['error']}")
        content = node.stdout.read(answer["bytes"])
        return np.frombuffer(content, answer["dtype"]).reshape(answer["shape"])

    def close(self) -> None:
        self._node.communicate()


def start_zarrita() -> Zarrita:
    """zarrita, where it is installed; skips the test where not. With CI=true that is a failure."""
    missing = "" if shutil.which("node") else "node is not installed"
    if not missing and not (ZARRITA / "node_modules").is_dir():
        missing = "zarrita is not installed; type: npm ci --prefix tests/zarrita"
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    return Zarrita()


IN_PROCESS: dict[str, Reader] = {
    "zarr-python": by_zarr,
    "tensorstore": by_tensorstore,
    "dask": by_dask,
}
LIBRARIES = (*IN_PROCESS, "zarrita")


@contextlib.contextmanager
def library(name: str) -> Iterator[Reader]:
    """One of LIBRARIES."""
    if name in IN_PROCESS:
        yield IN_PROCESS[name]
        return
    zarrita = start_zarrita()
    try:
        yield zarrita
    finally:
        zarrita.close()


def block(array: Path, *planes: Planes) -> tuple[slice, ...]:
    """So much of an array as holds these planes, and one slot more each way; slices of t, c, z.

    The shape may run far ahead of the planes.
    """
    shape = zarr.open_array(array, mode="r").shape
    used = np.max([slot for known in planes for slot in known], axis=0) + 2
    return tuple(slice(0, int(min(stop))) for stop in zip(used, shape, strict=False))


def assert_shows(found: Pixels, sure: Planes, maybe: Planes) -> None:
    """*found* (t, c, z, y, x) has all *sure* planes, and 0 in other slots but for *maybe* some."""
    assert found.ndim == 5
    assert np.all(np.max(list(sure), axis=0) < found.shape[:3])
    for slot in np.ndindex(*found.shape[:3]):
        wanted = sure.get(slot, np.zeros(found.shape[3:], found.dtype))
        if slot in maybe and found[slot].any():
            wanted = maybe[slot]
        np.testing.assert_array_equal(found[slot], wanted, strict=True, err_msg=f"slot {slot}")
