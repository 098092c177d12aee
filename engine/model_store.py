"""The generators of this computer: those that ship, those installed, and which is the current one.

Installed ones are copies in the user's data folder, in `models/NAME-VERSION-HASH`: what happens
later to the folder that they came from harms nobody. `models/current.json` keeps all that were
chosen, in order; the last is the current one. It is what the setting `generator = "current"` means,
and where none was chosen that is the shipped `fluorescence`.

Whatever changes is written beside its place, synced, and moved there: a reader finds the old state
or the new one, also after a power cut. Several may choose at once: changes to what was chosen wait
for each other. Choosing the current one again is a change, too: whoever follows tries it again.

What cannot be read is a PackageError that says what to do. Nothing falls back on another generator
by itself: the planes would look different, and nobody would know why.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import msgspec
import platformdirs

from engine import package
from engine.files import write_whole
from engine.install import install
from engine.package import MANIFEST, Package
from refocus.errors import PackageError

CURRENT = "current"
"""Stands for the generator that was chosen last."""
UNCHOSEN = "fluorescence"
"""The current one where none was chosen."""
FORMAT = 1
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


def find_by_hash(package_hash: str) -> list[Path]:
    """Folders of the shipped and installed generators of that hash; `load` knows the sound ones."""
    return [folder for folder in _folders() if _hash(folder) == package_hash]


def stamp() -> tuple[int, ...]:
    """Something cheap that is another after every `use` and `rollback`, by any process.

    Also where the same one was chosen again: what kept it from working may be gone.
    """
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
            found = install(found, store_folder())
    name = found.folder.name
    with _writing(), _alone():
        try:
            chosen = _read_pointer().chosen
        except PackageError:  # damaged: what was chosen before is gone anyway
            chosen = ()
        _write_pointer(chosen if chosen[-1:] == (name,) else (*chosen, name))
    return found


def rollback() -> Package:
    """Make the generator that was current before this one current again.

    Raises PackageError where there was none, it is not sound any more, or the store cannot be
    written.
    """
    if not _read_pointer().chosen:
        raise PackageError(
            f"nothing to go back to: none was chosen, {UNCHOSEN} is the current generator anyway"
        )
    with _writing(), _alone():
        before = _read_pointer().chosen[:-1]
        found = package.load(_folder(before[-1] if before else UNCHOSEN))
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
        try:
            manifests = sorted(place.glob(f"*/{MANIFEST}"))
        except OSError as error:
            raise PackageError(f"the generators in {place} cannot be listed: {error}") from error
        for manifest in manifests:
            if not manifest.parent.name.startswith("."):  # a copy that was never finished
                yield manifest.parent


def _own_name(folder: Path) -> str | None:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Named).name
    except (OSError, ValueError, RecursionError):  # msgspec's own are ValueErrors
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
    except (OSError, ValueError, RecursionError) as error:
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


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nobody else changes the pointer meanwhile, where the file system has locks."""
    store_folder().mkdir(parents=True, exist_ok=True)
    with (store_folder() / "current.lock").open("ab", buffering=0) as file:
        with contextlib.suppress(OSError):  # no locks there: the pointer is whole all the same
            _wait_for(file)
        yield


def _write_pointer(chosen: tuple[str, ...]) -> None:
    write_whole(_pointer_path(), msgspec.json.encode(_Pointer(chosen=chosen)))


if sys.platform == "win32":
    import msvcrt

    def _wait_for(file: FileIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)

else:
    import fcntl

    def _wait_for(file: FileIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)
