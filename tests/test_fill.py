"""Every raw plane gets its twin in the end, or a written reason, by the run's own generator."""

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from acquire.fill import fill
from engine import scaling
from engine.package import Package
from engine.scaling import Scaling
from refocus.cli.main import main
from refocus.errors import PackageError
from refocus.frame import RefocusOutcome
from refocus.settings import ChannelSettings
from store.check import check
from store.reader import State, open_run
from store.records import Kind
from store.writer import RunWriter
from tests import identity_package
from tests.unfilled import (
    SHAPE,
    assert_made_with,
    digest,
    make_run,
    outcomes,
    settings,
    skipped,
    times,
)


def test_every_plane_that_was_not_refocused_gets_its_twin(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    why = {
        0: (RefocusOutcome.SKIPPED, "engine busy or absent"),
        1: (RefocusOutcome.LOST, "its worker was given up"),
        2: (RefocusOutcome.LATE, "answered after its worker had been given up"),
        3: (RefocusOutcome.FAILED, "out of memory"),
        4: (RefocusOutcome.REJECTED, "pixel size 9 um is outside"),
    }
    make_run(path, negated, times(7), outcome=lambda seq: why.get(seq))
    before = open_run(path)
    said: list[tuple[int, int]] = []
    filled = fill(path, settings(), progress=lambda done, total: said.append((done, total)))
    assert (filled.planes, filled.filled, filled.left) == (4, 4, 0), filled
    assert said[-1] == (4, 4)
    run = open_run(path)
    assert outcomes(run) == {"REFOCUSED": 6, "REJECTED": 1}
    assert run.state is State.COMPLETE
    assert check(path).findings == ()
    for seq in (5, 6):  # refocused live: untouched
        assert run.record(seq, Kind.REFOCUS) == before.record(seq, Kind.REFOCUS)
    for seq in range(4):
        record = run.record(seq, Kind.REFOCUS)
        assert record is not None
        assert record.latency_ns == 0, "nobody waited for it"
        assert run.notes.generators[record.generator].package_hash == negated.hash


def test_nothing_left_means_nothing_written(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(3))
    assert fill(path, settings()).filled == 3
    files = digest(path)
    again = fill(path, settings())
    assert (again.planes, again.filled, again.left) == (0, 0, 0)
    assert digest(path) == files


def test_a_run_that_was_never_closed_says_so_where_nothing_is_left(
    tmp_path: Path, negated: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(2), outcome=lambda _: None)
    lines = path / "journal" / "run.jsonl"
    *kept, _ = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(kept))
    assert main(["fill", str(path)]) == 0
    said = capsys.readouterr().out
    assert "nothing to fill" in said
    assert "never closed; run `refocus recover`" in said


def test_the_scaling_is_the_runs_own_bit_for_bit(tmp_path: Path, negated: Package) -> None:
    """Not what today's rule would say of these frames; two channels, each its own."""
    path = tmp_path / "run"
    maps = {"DAPI": Scaling(131.0 / 3, 1e3 / 7), "FITC": Scaling(77.7, 0.1 + 0.2)}

    def note(writer: RunWriter) -> None:
        for name, one in maps.items():
            writer.note_scaling(name, one.offset, one.scale)

    axes = [{"time": t, "channel": c} for t in range(3) for c in maps]
    make_run(path, negated, axes, notes=note)
    assert fill(path, settings()).filled == 6
    run = open_run(path)
    assert {n: Scaling(s.offset, s.scale) for n, s in run.notes.scalings.items()} == maps
    assert_made_with(run, negated, maps)
    lines = (path / "journal" / "run.jsonl").read_text().splitlines()
    assert sum('"scaling"' in line for line in lines) == 2, "none was written again"


def test_a_channel_without_scaling_gets_one_that_later_fills_use(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    flat = np.full(SHAPE, 7, np.uint16)
    make_run(path, negated, times(60), planes={0: flat})
    stop = threading.Event()
    first = fill(path, settings(), stop=stop, progress=lambda done, _: done >= 2 and stop.set())
    assert 0 < first.left < 59
    run = open_run(path)
    rule = scaling.derive([run.raw(1)])  # type: ignore[list-item]
    assert rule is not None
    noted = run.notes.scalings["DAPI"]
    assert Scaling(noted.offset, noted.scale) == rule
    rest = fill(path, settings())
    assert (rest.planes, rest.filled) == (first.left, first.left)
    run = open_run(path)
    assert run.notes.scalings["DAPI"] == noted
    assert outcomes(run) == {"REFOCUSED": 59, "REJECTED": 1}
    rejected = run.record(0, Kind.REFOCUS)
    assert rejected is not None
    assert "flat" in run.reason(rejected)


@pytest.mark.parametrize("known", [None, "Default-G"])
def test_the_planes_of_a_colour_exposure_share_one_scaling(
    tmp_path: Path, negated: Package, known: str | None
) -> None:
    path = tmp_path / "run"
    own = Scaling(40.5, 33.25)
    make_run(
        path,
        negated,
        [{"time": t, "channel": f"Default-{c}"} for t in range(2) for c in "RGB"],
        notes=lambda writer: known and writer.note_scaling(known, own.offset, own.scale),
    )
    assert fill(path, settings()).filled == 6
    run = open_run(path)
    maps = {name: Scaling(s.offset, s.scale) for name, s in run.notes.scalings.items()}
    assert set(maps) == {"Default-R", "Default-G", "Default-B"}
    assert len(set(maps.values())) == 1
    assert known is None or maps["Default-R"] == own
    assert_made_with(run, negated, maps)


def test_the_modality_of_the_run_holds_not_that_of_the_day(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    phase = ChannelSettings(modality="phase")
    axes = times(2, "trans") + times(2, "DAPI")
    make_run(path, negated, axes, channels={"trans": phase})
    today = msgspec.structs.replace(settings(), channels={"DAPI": phase})
    filled = fill(path, today)
    assert (filled.filled, filled.rejected, filled.left) == (2, 2, 0)
    assert "[channels.trans] modality is phase" in next(iter(filled.reasons))
    assert fill(path, today).planes == 0, "rejected for good"


def test_another_generator_gets_what_the_runs_own_rejected(
    tmp_path: Path, negated: Package
) -> None:
    path = tmp_path / "run"
    fine = identity_package.make(tmp_path / "fine", name="fine", pixel_um=(0.01, 0.02))
    coarse = identity_package.make(tmp_path / "coarse", name="coarse", pixel_um=(6.0, 7.0))
    make_run(path, fine, times(3), pixel_um=0.3)
    assert fill(path, settings()).rejected == 3
    record = open_run(path).record(0, Kind.REFOCUS)
    assert record is not None
    assert open_run(path).notes.generators[record.generator].package_hash == fine.hash
    assert fill(path, settings()).planes == 0, "its own said so for good"
    assert fill(path, settings(), generator=str(fine.folder)).planes == 0, "named or not"
    assert fill(path, settings(), generator=str(coarse.folder)).rejected == 3
    assert fill(path, settings(), generator=str(coarse.folder)).planes == 0
    assert fill(path, settings(), generator=str(negated.folder)).filled == 3


def test_a_run_without_its_generator_says_so(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(3), outcome=lambda seq: skipped(seq) if seq else None)
    identity = identity_package.make(tmp_path / "identity")
    negated.folder.rename(tmp_path / "elsewhere")
    identity.folder.rename(negated.folder)  # another one under its name
    files = digest(path)
    with pytest.raises(PackageError, match=rf"negated 0 \({negated.hash[:12]}\).*--generator"):
        fill(path, settings())
    assert digest(path) == files
    assert fill(path, settings(), generator=str(tmp_path / "elsewhere")).filled == 2


def test_what_the_generator_fails_on_is_tried_again(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    broken = identity_package.make(tmp_path / "broken", name="broken", answer="nan")
    make_run(path, broken, times(3))
    for _ in range(2):
        filled = fill(path, settings())
        assert (filled.planes, filled.filled, filled.failed) == (3, 0, 3)
    (reason,) = filled.reasons
    assert "finite" in reason
    assert fill(path, settings(), generator=str(negated.folder)).filled == 3


def test_a_damaged_raw_plane_fails_alone(tmp_path: Path, negated: Package) -> None:
    path = tmp_path / "run"
    make_run(path, negated, times(4))
    record = open_run(path).record(2, Kind.RAW)
    assert record is not None
    raw = open_run(path).raw(2)
    assert raw is not None
    shards = [file for file in (path / "0" / "0").rglob("*") if file.is_file()]
    (shard,) = (file for file in shards if raw.tobytes() in file.read_bytes())
    content = bytearray(shard.read_bytes())
    content[content.index(raw.tobytes())] ^= 1
    shard.write_bytes(content)
    filled = fill(path, settings())
    assert (filled.filled, filled.failed, filled.left) == (3, 1, 0)
    (reason,) = filled.reasons
    assert "does not fit its checksum" in reason
    assert "cannot be read back" in reason
