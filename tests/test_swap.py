"""A generator that is chosen during a run takes over between two frames, and costs none of them.

All workers here are real processes with a real runtime.
"""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from acquire.own_generator import own_package
from engine import model_store
from engine.package import Package
from refocus.errors import PackageError
from refocus.frame import RefocusOutcome
from store.reader import open_run
from store.records import Kind
from tests import hanging_package, identity_package
from tests.recording import assert_raw, events
from tests.swaps import Recording, assert_sound, in_use, makers


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a computer on which nothing was chosen yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return model_store.store_folder()


@pytest.fixture
def identity(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "identity", name="identity")


def test_a_newly_chosen_generator_takes_over_between_two_frames(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        first = r.worker_pid
        model_store.use(identity.folder)
        one.works_with("identity")
        assert r.worker_pid != first
        model_store.rollback()
        one.works_with("negated")
    assert r.trouble == []
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert [name for name, _ in in_use(run)] == ["negated", "identity", "negated"]
    assert makers(run).total() == len(one.taken), "none was lost, none skipped"
    assert set(makers(run)) == {"negated", "identity"}
    hashes = {line.package_hash for line in run.notes.generators.values()}
    assert hashes == {negated.hash, identity.hash}
    assert {line.event for line in run.notes.events} == {
        "generator_in_use",
        "worker_started",
        "worker_ready",
    }, "none died, none was given up"


def test_pixel_range_follows_the_generator(tmp_path: Path, identity: Package) -> None:
    narrow = identity_package.make(tmp_path / "narrow", name="narrow", pixel_um=(1.0, 2.0))
    model_store.use(identity.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("identity")
        model_store.use(narrow.folder)
        one.shoot_until(lambda: r.status().counts.rejected >= 2)
        model_store.rollback()
        one.works_with("identity")
    run = open_run(one.path)
    assert_sound(run, one.taken)
    rejected = [r for r in run.records(Kind.REFOCUS) if r.outcome == RefocusOutcome.REJECTED]
    assert {run.notes.generators[r.generator].name for r in rejected} == {"narrow"}
    assert all("'narrow'" in run.reason(record) for record in rejected)


@pytest.mark.parametrize("how", ["altered", "rubbish", "gone"])
def test_a_generator_that_cannot_be_used_is_told_once_and_the_one_before_goes_on(
    tmp_path: Path, negated: Package, own_store: Path, how: str
) -> None:
    weights = np.zeros((1, 1, 3, 3), np.float32)
    bad = identity_package.write_package(tmp_path / "bad", b"no network", weights, "bad", 16, 16)
    model_store.use(bad.folder)
    model_store.use(negated.folder)
    installed = model_store.find("bad")
    if how == "altered":
        (installed / "golden.npz").write_bytes(b"altered")
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        pid = r.worker_pid
        if how == "rubbish":
            model_store.use("bad")
        elif how == "altered":
            with pytest.raises(PackageError):
                model_store.use("bad")
        pointer = own_store / "current.json"
        if how != "rubbish":  # by another hand, past all checks
            pointer.write_text(f'{{"chosen": ["{installed.name if how == "altered" else how}"]}}')
        one.shoot_until(lambda: bool(r.trouble))
        one.works_with("negated")
        assert r.worker_pid == pid
    (line,) = r.trouble
    assert "negated goes on" in line
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert makers(run) == {"negated": len(one.taken)}
    assert [name for name, _ in in_use(run)] == ["negated"]


def test_choosing_again_while_one_gets_ready_drops_that(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    other = identity_package.make(tmp_path / "other", name="other")
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        started = events(one.path, "worker_started")
        model_store.use(other.folder)
        one.shoot_until(lambda: events(one.path, "worker_started") > started)
        model_store.use(identity.folder)
        one.works_with("identity")
        for _ in range(3):  # faster than anyone looks
            model_store.use("negated")
            model_store.use("identity")
        one.works_with("identity")
    assert r.trouble == []
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert [name for name, _ in in_use(run)] == ["negated", "identity"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_swap_while_the_worker_is_dead_or_stopped(
    tmp_path: Path, negated: Package, identity: Package, how: signal.Signals
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        assert r.worker_pid is not None
        os.kill(r.worker_pid, how)
        model_store.use(identity.folder)
        one.works_with("identity")
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert [name for name, _ in in_use(run)] == ["negated", "identity"]


def test_a_hung_generator_is_replaced(tmp_path: Path, identity: Package) -> None:
    """It never answers: what it has is lost in time, and nothing else waits for it."""
    hanging = hanging_package.make(tmp_path / "hanging")
    model_store.use(hanging.folder)
    one = Recording(tmp_path, frame_timeout_ms=3000)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.shoot()
        model_store.use(identity.folder)
        one.until(lambda: r.status().generator == "identity")
        one.works_with("identity")
        one.until(lambda: r.status().counts.lost >= 1)
    assert_raw(open_run(one.path), one.taken)
    assert [name for name, _ in in_use(open_run(one.path))] == ["hanging", "identity"]


def test_a_generator_that_nobody_can_use_at_the_start_can_be_replaced(
    tmp_path: Path, identity: Package, own_store: Path
) -> None:
    model_store.use(identity.folder)
    (own_store / "current.json").write_text('{"chosen": ["gone"]}')
    one = Recording(tmp_path)
    with one.recorder as r:
        assert not r.wait_for_engine(30)
        one.shoot()
        one.until(lambda: r.status().counts.skipped == 1)
        assert any("gone" in line and "models use" in line for line in r.trouble)
        model_store.use("identity")
        one.works_with("identity")
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert makers(run) == {"identity": len(one.taken)}, "the skipped one got its twin at the end"


def test_a_run_that_ends_while_a_generator_gets_ready(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        started = events(one.path, "worker_started")
        model_store.use(identity.folder)
        one.until(lambda: events(one.path, "worker_started") > started)
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert makers(run).total() == len(one.taken)


def test_a_generator_that_was_named_stays(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    one = Recording(tmp_path, generator=str(negated.folder))
    with one.recorder as r:
        assert r.wait_for_engine(30)
        model_store.use(identity.folder)
        one.works_with("negated", frames=20)
        assert events(one.path, "worker_started") == 1
    assert makers(open_run(one.path)) == {"negated": len(one.taken)}


def test_fill_takes_the_generator_that_the_run_had_last(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        model_store.use(identity.folder)
        one.works_with("identity")
    model_store.rollback()
    assert own_package(open_run(one.path)).hash == identity.hash


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killing", [False, True])
def test_generators_are_chosen_again_and_again_for_a_minute(
    tmp_path: Path, negated: Package, identity: Package, killing: bool
) -> None:
    for package in (negated, identity):
        model_store.use(package.folder)
    rng = np.random.default_rng(5)
    one = Recording(tmp_path, fill_at_end_s=0.0)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        begin = choose_at = time.monotonic()
        kill_at = begin + (5.0 if killing else 1e9)
        while (now := time.monotonic()) - begin < 60.0:
            one.shoot()
            time.sleep(0.02)
            if now >= choose_at:
                model_store.use(str(rng.choice(["negated", "identity"])))
                choose_at = now + float(rng.choice([0.01, 0.3, 1.0, 3.0]))
            if now >= kill_at and r.worker_pid is not None:
                os.kill(r.worker_pid, int(rng.choice([signal.SIGKILL, signal.SIGSTOP])))
                kill_at = now + 7.0
    run = open_run(one.path)
    assert_sound(run, one.taken)
    outcomes = Counter(RefocusOutcome(r.outcome).name for r in run.records(Kind.REFOCUS))
    changes = len(in_use(run)) - 1
    print(f"{len(one.taken)} frames, {changes} changes, {dict(outcomes)}")
    assert changes > 5
    assert killing or outcomes["LOST"] == outcomes["FAILED"] == 0
