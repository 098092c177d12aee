"""Planes on their way to the disk: what fails beside them neither moves nor shows another plane."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from faulty_os import Call, FaultyOs
from shard_arrays import MIB_SHAPE, Arrays, plane
from store_runs import frame, start

from refocus.errors import RunError
from store import disk
from store.check import check
from store.layout import Pair
from store.reader import open_run


def refused(call: Call) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(call.path))


def test_a_plane_whose_pair_cannot_be_told_is_not_written(tmp_path: Path, faulty: FaultyOs) -> None:
    def refuse_pairs(call: Call) -> Any:
        tells = call.writes and b'"kind":"pair"' in bytes(call.args[1])
        return refused(call) if tells else call.do()

    path = tmp_path / "run"
    run = start(path)
    faulty.rule = refuse_pairs
    with pytest.raises(RunError, match=r"frame 0: not saved: .*No space left"):
        run.write_raw(frame(0, {"time": 0}), {})
    faulty.rule = Call.do
    run.write_raw(frame(1, {"time": 1}), {})
    counts = run.close(complete=True, expected_frames=2)
    assert (counts.saved, counts.failed) == (1, 1)
    shown = np.asarray(zarr.open_array(path / "0" / "0", mode="r")[:])
    assert not shown[0].any()
    np.testing.assert_array_equal(shown[1, 0, 0], open_run(path).raw(1))


def test_a_copy_is_good_until_it_is_written_however_many_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "takes_direct_writes", lambda _: True)
    monkeypatch.setattr(disk, "is_aligned", lambda _: False)
    arrays = Arrays(tmp_path)
    array = arrays.add("a", MIB_SHAPE)
    wanted = [plane((t, 0, 0), MIB_SHAPE) for t in range(5)]
    staged = [array.stage(pixels) for pixels in wanted]
    for one, pixels in zip(staged, wanted, strict=True):
        assert one.memory is not None
        np.testing.assert_array_equal(one.pixels, pixels)
    arrays.shards.give_back(staged[3])
    assert array.stage(wanted[0]).memory is staged[3].memory
    assert array.stage(wanted[0]).memory is not staged[3].memory


def test_a_plane_that_could_not_be_acknowledged_is_shown_to_nobody(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = tmp_path / "run"
    run = start(path)
    run.write_raw(frame(0, {"time": 0}), {})
    acknowledgements = iter([refused])
    faulty.rule = lambda call: (
        next(acknowledgements, Call.do)(call)
        if call.writes and call.path.name == "outcomes.bin"
        else call.do()
    )
    with pytest.raises(RunError, match=r"frame 1: not saved: .*No space left"):
        run.write_raw(frame(1, {"time": 1}), {})
    run.write_raw(frame(2, {"time": 2}), {})
    counts = run.close(complete=True, expected_frames=3)
    assert (counts.saved, counts.failed) == (2, 1)
    shown = np.asarray(zarr.open_array(path / "0" / "0", mode="r")[:])
    assert [bool(plane.any()) for plane in shown] == [True, False, True]
    assert not check(path).remarks


def test_a_tall_stack_is_not_looked_through_at_every_plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = Pair.z_step_um.fget
    assert real is not None

    def look(pair: Pair) -> float | None:
        looks.append(len(pair.z_um))
        step: float | None = real(pair)
        return step

    monkeypatch.setattr(Pair, "z_step_um", property(look))
    run = start(tmp_path / "run")
    for z in range(200):
        run.put_raw(frame(z, {"z": z}, (1, 1), z_um=0.5 * z), {})
    assert looks[:8] == list(range(1, 9))
    assert len(looks) < 50
    run.close(complete=True, expected_frames=200)
    assert looks[-1] == 200
