"""The generators of this computer: those that ship, those installed, and which is the current one.

Installed ones are copies in the user's data folder, in `models/NAME-VERSION-HASH`: what happens
later to the folder that they came from harms nobody. `models/current.json` keeps all that were
chosen, in order; the last is the current one. It is what the setting `generator = "current"` means,
and where none was chosen that is the shipped `fluorescence`.

Whatever changes is written beside its place, synced, and moved there: a reader finds the old state
or the new one, also after a power cut. What cannot be read is a PackageError that says what to do.
Nothing falls back on another generator by itself: the planes would look different, and nobody would
know why.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import platformdirs

from engine import package
from engine.package import FILES, MANIFEST, Package
from refocus.errors import PackageError

CURRENT = "current"
"""Stands for the generator that was chosen last."""
UNCHOSEN = "fluorescence"
"""The current one where none was chosen."""
FORMAT = 1
HASH_DIGITS = 12
"""Of a package's hash, at the end of its folder's name."""
CHOOSE = "choose one with `refocus models use`"


class _Pointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int = FORMAT
    chosen: tuple[str, ...] = ()
    """Names of folders, of shipped generators or in the store."""


class _Named(msgspec.Struct):
    name: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A generator on this computer."""

    name: str
    """Its folder's; `find` and `use` take it."""
    shipped: bool
    current: bool
    package: Package | None
    problem: str
    """Why there is no package; empty where there is one."""


def store_folder() -> Path:
    """Where installed generators lie, this user's on this computer; it need not exist."""
    return platformdirs.user_data_path("refocus") / "models"


def find(name_or_path: str | Path) -> Path:
    """Folder of the generator that is meant.

    That is "current", a shipped one, an installed one (by its folder's name; by its own name where
    only one has that), or the package in the folder of that path. Raises PackageError, with the
    names there are, where it is none of these.
    """
    wanted = str(name_or_path)
    if wanted == CURRENT:
        return _folder(_current_name())
    folders = {folder.name: folder for folder in _folders()}
    if wanted in folders:
        return folders[wanted]
    alike = [folder for folder in _folders() if _own_name(folder) == wanted]
    if len(alike) == 1:
        return alike[0]
    if alike:
        names = ", ".join(folder.name for folder in alike)
        raise PackageError(f"several generators are called {wanted!r}: say which, {names}")
    if Path(wanted).is_dir():
        return Path(wanted)
    raise PackageError(
        f"no generator {wanted!r}: wanted {CURRENT!r}, the folder of a model package, or one of "
        f"{', '.join(folders)}"
    )


def find_by_hash(package_hash: str) -> Path | None:
    """Folder of the shipped or installed generator of that hash; None: it is not here."""
    return next((folder for folder in _folders() if _hash(folder) == package_hash), None)


def stamp() -> tuple[int, ...]:
    """Something cheap that is another after every `use` and `rollback`, by any process."""
    try:
        found = _pointer_path().stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def use(name_or_path: str | Path) -> Package:
    """Make this generator the current one; that of a folder is installed before.

    Raises PackageError where it is not sound, or the store cannot be written.
    """
    found = package.load(find(name_or_path))
    if found.folder.parent not in (package.SHIPPED, store_folder()):
        with _writing():
            found = _install(found)
    try:
        chosen = _read_pointer().chosen
    except PackageError:  # damaged: what was chosen before is gone anyway
        chosen = ()
    if chosen[-1:] != (found.folder.name,):
        with _writing():
            _write_pointer((*chosen, found.folder.name))
    return found


def rollback() -> Package:
    """Make the generator that was current before this one current again.

    Raises PackageError where there was none, it is not sound any more, or the store cannot be
    written.
    """
    chosen = _read_pointer().chosen
    if not chosen:
        raise PackageError(
            f"nothing to go back to: none was chosen, {UNCHOSEN} is the current generator anyway"
        )
    before = chosen[:-1]
    found = package.load(_folder(before[-1] if before else UNCHOSEN))
    with _writing():
        _write_pointer(before)
    return found


def listed() -> tuple[list[Listed], str]:
    """Every shipped and installed generator; and why none of them is current, or nothing."""
    try:
        current, trouble = _folder(_current_name()), ""
    except PackageError as error:
        current, trouble = None, str(error)
    found = []
    for folder in _folders():
        loaded, problem = None, ""
        try:
            loaded = package.load(folder)
        except PackageError as error:
            problem = str(error)
        found.append(
            Listed(
                folder.name, folder.parent == package.SHIPPED, folder == current, loaded, problem
            )
        )
    return found, trouble


def _folders() -> Iterator[Path]:
    for place in (package.SHIPPED, store_folder()):
        for manifest in sorted(place.glob(f"*/{MANIFEST}")):
            if not manifest.parent.name.startswith("."):  # a copy that was never finished
                yield manifest.parent


def _own_name(folder: Path) -> str | None:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Named).name
    except (OSError, msgspec.DecodeError):
        return None


def _hash(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _pointer_path() -> Path:
    return store_folder() / "current.json"


def _current_name() -> str:
    chosen = _read_pointer().chosen
    return chosen[-1] if chosen else UNCHOSEN


def _folder(name: str) -> Path:
    """Folder of one that was chosen."""
    folder = next((folder for folder in _folders() if folder.name == name), None)
    if folder is None:
        raise PackageError(
            f"the current generator, {name}, is not in {store_folder()} any more; {CHOOSE}"
        )
    return folder


def _read_pointer() -> _Pointer:
    path = _pointer_path()
    try:
        pointer = msgspec.json.decode(path.read_bytes(), type=_Pointer)
    except FileNotFoundError:
        return _Pointer()
    except (OSError, msgspec.DecodeError) as error:
        raise PackageError(
            f"which generator is current cannot be read: {path}: {error}; {CHOOSE}"
        ) from error
    if pointer.format != FORMAT:
        raise PackageError(
            f"{path} has format {pointer.format}, this Refocus reads {FORMAT}; update it, or "
            f"{CHOOSE}"
        )
    return pointer


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PackageError(f"{store_folder()} cannot be written: {error}") from error


def _write_pointer(chosen: tuple[str, ...]) -> None:
    path = _pointer_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=".current-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(_Pointer(chosen=chosen)))
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _install(found: Package) -> Package:
    """A copy of the package in the store, checked there."""
    store, manifest = store_folder(), found.manifest
    target = store / f"{manifest.name}-{manifest.version}-{found.hash[:HASH_DIGITS]}"
    with contextlib.suppress(PackageError):
        if (there := package.load(target)).hash == found.hash:
            return there
    store.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".", dir=store))
    try:
        for name in (*FILES, MANIFEST):
            _copy_durably(found.folder / name, unfinished / name)
        if package.load(unfinished).hash != found.hash:
            raise PackageError(f"model package {found.folder} changed meanwhile; try again")
        unfinished.chmod(0o755)  # mkdtemp makes it private
        _sync_folder(unfinished)
        shutil.rmtree(target, ignore_errors=True)  # a damaged copy of it
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(store)
    return package.load(target)


def _copy_durably(source: Path, target: Path) -> None:
    with source.open("rb") as original, target.open("xb") as copy:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _sync_folder(folder: Path) -> None:
    """What was moved into *folder* survives a power cut. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
