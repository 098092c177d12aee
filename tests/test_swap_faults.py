"""Damage to the store, or its absence, costs no raw frame; choosing again mends it.

All workers here are real processes with a real runtime.
"""

import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest

from engine import model_store
from engine.package import Package
from store.reader import open_run
from tests import identity_package
from tests.damaged_store import flip_a_bit, go_away
from tests.recording import assert_raw, events
from tests.swaps import Recording, assert_sound, in_use


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a computer on which nothing was chosen yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return model_store.store_folder()


@pytest.fixture
def identity(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "identity", name="identity")


def damage(what: str, negated: Package, own_store: Path) -> None:
    """One byte of it, after `negated` was chosen."""
    pointer = own_store / "current.json"
    installed = own_store / f"negated-0-{negated.hash[:12]}"
    flip_a_bit(pointer if what == "pointer" else installed / "manifest.json", b"negated")
    os.utime(pointer)


@pytest.mark.parametrize("what", ["pointer", "manifest"])
def test_a_damaged_store_at_the_start(
    tmp_path: Path, negated: Package, own_store: Path, what: str
) -> None:
    model_store.use(negated.folder)
    damage(what, negated, own_store)
    one = Recording(tmp_path)
    with one.recorder as r:
        one.shoot()
        (line,) = r.trouble
        assert "raw only" in line
        model_store.use(negated.folder)
        one.works_with("negated")
    assert_sound(open_run(one.path), one.taken)


@pytest.mark.parametrize("what", ["pointer", "manifest"])
def test_a_store_that_is_damaged_underway(
    tmp_path: Path, negated: Package, identity: Package, own_store: Path, what: str
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        damage(what, negated, own_store)
        one.shoot_until(lambda: bool(r.trouble))
        one.works_with("negated")
        model_store.use(identity.folder)
        one.works_with("identity")
    (line,) = r.trouble
    assert "negated goes on" in line
    assert_sound(open_run(one.path), one.taken)


def test_a_damaged_copy_that_was_made_again_is_noticed(tmp_path: Path, negated: Package) -> None:
    """The pointer said so all the time."""
    installed = model_store.use(negated.folder).folder
    (installed / "weights.safetensors").write_bytes(b"damaged")
    one = Recording(tmp_path)
    with one.recorder as r:
        one.shoot()
        assert any("altered" in line for line in r.trouble)
        model_store.use(negated.folder)
        one.works_with("negated")
    assert_sound(open_run(one.path), one.taken)


def test_choosing_the_one_in_use_again_starts_new_workers_where_all_were_given_up(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    """As on a GPU without memory, until another program has ended."""
    model_store.use(negated.folder)
    unable = tmp_path / "unable"
    unable.write_text("#!/bin/sh\necho no memory\nexit 2\n")
    unable.chmod(0o755)
    one = Recording(tmp_path)
    with contextlib.ExitStack() as entered:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(unable))
            r = entered.enter_context(one.recorder)
            assert not r.wait_for_engine(30)
            one.until(lambda: events(one.path, "worker_given_up") == 1)
            model_store.use("negated")
            one.until(lambda: events(one.path, "worker_given_up") == 2)
            one.until(lambda: len(r.trouble) == 2)
        model_store.use("negated")
        one.works_with("negated")
        model_store.use(identity.folder)
        one.works_with("identity")
    assert all("no memory" in line and "goes on" not in line for line in r.trouble)
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert [name for name, _ in in_use(run)] == ["negated", "negated", "identity"]


def test_a_store_that_is_away_for_a_moment_is_looked_at_again(
    tmp_path: Path, negated: Package, identity: Package, own_store: Path
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        with pytest.MonkeyPatch.context() as patch:
            model_store.use(identity.folder)
            go_away(patch, own_store)
            one.shoot_until(lambda: bool(r.trouble))
            one.works_with("negated")
        one.works_with("identity")
    (line,) = r.trouble
    assert os.strerror(errno.ESTALE) in line
    assert "negated goes on" in line
    assert_sound(open_run(one.path), one.taken)


def test_a_store_that_is_away_at_the_start_is_looked_at_again(
    tmp_path: Path, identity: Package, own_store: Path
) -> None:
    model_store.use(identity.folder)
    one = Recording(tmp_path)
    with contextlib.ExitStack() as entered:
        with pytest.MonkeyPatch.context() as patch:
            go_away(patch, own_store)
            r = entered.enter_context(one.recorder)
            one.shoot()
        one.works_with("identity")
    (line,) = r.trouble
    assert "raw only" in line
    assert os.strerror(errno.ESTALE) in line
    assert_raw(open_run(one.path), one.taken)


def test_a_store_that_vanishes_changes_nothing(
    tmp_path: Path,
    negated: Package,
    identity: Package,
    own_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where nothing was ever chosen, by the looks of it."""
    model_store.use(negated.folder)
    looks: list[tuple[int, ...]] = []
    real = model_store.stamp

    def stamp() -> tuple[int, ...]:
        looks.append(real())
        return looks[-1]

    monkeypatch.setattr(model_store, "stamp", stamp)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        own_store.rename(tmp_path / "unplugged")
        one.until(lambda: looks.count(()) >= 2)
        one.works_with("negated")
        (tmp_path / "unplugged").rename(own_store)
        model_store.use(identity.folder)
        one.works_with("identity")
    assert r.trouble == []
    run = open_run(one.path)
    assert_sound(run, one.taken)
    assert [name for name, _ in in_use(run)] == ["negated", "identity"]


def test_a_surprise_does_not_end_the_following(
    tmp_path: Path, negated: Package, identity: Package
) -> None:
    model_store.use(negated.folder)
    one = Recording(tmp_path)
    with one.recorder as r:
        assert r.wait_for_engine(30)
        one.works_with("negated")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_store, "stamp", lambda: 1 / 0)
            one.shoot_until(lambda: bool(r.trouble))
        model_store.use(identity.folder)
        one.works_with("identity")
    (line,) = r.trouble
    assert "ZeroDivisionError" in line
    assert_sound(open_run(one.path), one.taken)
