"""Copies a model package into a store: whole and checked, or not at all.

The copy is made beside its place, synced, checked, and moved there. Several processes may install
the same package at once: the first one's copy stays, the others take it. A damaged copy is replaced
by moving it aside. What a kill leaves half-copied goes with the next installation a day later.
"""

import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from engine import package
from engine.files import sync_folder
from engine.package import FILES, MANIFEST, Package
from refocus.errors import PackageError

HASH_DIGITS = 12
"""Of a package's hash, at the end of its folder's name."""
UNFINISHED_S = 86400.0
"""A hidden entry of the store that is older was left by a kill."""
_TRIES = 10


def install(found: Package, store: Path) -> Package:
    """The package in the folder *store*, copied where it is not there. Raises OSError.

    PackageError where the original changes meanwhile.
    """
    manifest = found.manifest
    target = store / f"{manifest.name}-{manifest.version}-{found.hash[:HASH_DIGITS]}"
    _sweep(store)
    if there := _sound(target, found.hash):
        return there
    store.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".", dir=store))
    try:
        for name in (*FILES, MANIFEST):
            _copy_durably(found.folder / name, unfinished / name)
        copy = package.load(unfinished)
        if copy.hash != found.hash:
            raise PackageError(f"model package {found.folder} changed meanwhile; try again")
        unfinished.chmod(0o755)  # mkdtemp makes it private
        sync_folder(unfinished)
        _move_in(unfinished, target, found.hash)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_folder(store)
    return replace(copy, folder=target)


def _sound(folder: Path, package_hash: str) -> Package | None:
    with contextlib.suppress(PackageError):
        if (there := package.load(folder)).hash == package_hash:
            return there
    return None


def _move_in(unfinished: Path, target: Path, package_hash: str) -> None:
    """A damaged copy at *target* gives way; a sound one, of another process, stays."""
    aside = unfinished.with_name(f"{unfinished.name}-damaged")
    for left in reversed(range(_TRIES)):
        try:
            unfinished.rename(target)
            return
        except OSError:  # most often: it is there. Which number that has differs by system
            if left == 0:
                raise
        if _sound(target, package_hash):
            return
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(store: Path) -> None:
    for path in store.glob(".*"):
        with contextlib.suppress(OSError):  # another process sweeps, too
            if path.stat().st_mtime > time.time() - UNFINISHED_S:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _copy_durably(source: Path, target: Path) -> None:
    with source.open("rb") as original, target.open("xb") as copy:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())
