"""Keys with which a recorder and its workers on other hosts know each other (CURVE, ZeroMQ's own).

A key set is a folder on the recorder's computer:

  recorder.key       the recorder's secret: it never leaves this folder
  workers/NAME.pub   the public key of a worker that may connect: without this file it may not
  worker-NAME.key    that worker's secret, and the recorder's public key: to be moved to its host,
                     which needs nothing else

So a worker's host can speak for itself alone, and a right is taken away by deleting one file here,
without a word to the other host. A recorder that runs sees both within a second.

Files with a secret are made with mode 0600, refused where others may read them, and never written
over. Where there are no modes (Windows) the folder decides who reads: keep it in the user's own.
pyzmq's certificates would do for the cryptography; they are made readable for everyone, written
over without asking, and take two files to a host, hence the small TOML files here.
"""

import errno
import os
import re
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from refocus.errors import SettingsError

RECORDER = "recorder.key"
WORKERS = "workers"
PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class RecorderKey:
    """Both halves of a recorder's key, as CURVE writes them: 40 characters of Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """Both halves of a worker's key, and the public half of its recorder's."""

    name: str
    public: str
    secret: str = field(repr=False)
    recorder: str


def new(folder: Path) -> None:
    """Makes a key set without a worker in *folder*, which may exist.

    Raises SettingsError where it has a key set already, or cannot be written.
    """
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        public, secret = _pair()
        _write(
            folder / RECORDER,
            "# Secret key of a recorder. It stays in this folder; no other computer needs it.",
            {"public": public, "secret": secret},
        )
        (folder / WORKERS).mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    except FileExistsError:
        raise SettingsError(
            f"{folder} holds a key set already, and keys are never written over; add a worker to "
            "it with refocus keys add, or choose another folder"
        ) from None
    except OSError as error:
        raise SettingsError(f"{folder}: no key set can be made here: {error.strerror}") from error


def check_name(name: str) -> None:
    """Raises SettingsError where *name* cannot be a worker's."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"a worker's name must match {_NAME.pattern}, got {name!r}")


def add(folder: Path, name: str) -> Path:
    """Lets worker *name* in; returns the file that its host needs.

    Raises SettingsError where there is no key set, or a worker of that name.
    """
    check_name(name)
    recorder = read_recorder(folder)
    handed_over = folder / f"worker-{name}.key"
    public, secret = _pair()
    try:
        if handed_over.exists():  # left by an add that was killed, or put here by someone
            raise FileExistsError(errno.EEXIST, "exists", str(handed_over))
        _write(
            _public_file(folder, name),
            f"# Worker {name} may connect as long as this file is here.",
            {"public": public},
        )
        _write(
            handed_over,
            f"# Secret key of worker {name}. Move this file to its computer; it needs no other.",
            {"name": name, "public": public, "secret": secret, "recorder": recorder.public},
        )
    except FileExistsError as error:
        raise SettingsError(
            f"{error.filename} is there already, and keys are never written over; choose another "
            f"name, or take the old right away first: refocus keys remove {folder} {name}"
        ) from None
    except OSError as error:
        raise SettingsError(f"{folder}: no key can be added: {error.strerror}") from error
    return handed_over


def remove(folder: Path, name: str) -> None:
    """Takes worker *name*'s right away. Raises SettingsError where it has none."""
    read_recorder(folder)
    held = [_public_file(folder, name), folder / f"worker-{name}.key"]
    if not _NAME.fullmatch(name) or not any(_is_file(file) for file in held):
        known = ", ".join(names(folder)) or "nobody"
        raise SettingsError(f"{folder} knows no worker {name!r}; it lets in {known}")
    try:
        for file in held:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be deleted: {error.strerror}") from error


def read_recorder(folder: Path) -> RecorderKey:
    """The recorder's key. Raises SettingsError where it is missing, damaged or open to others."""
    if not _is_file(folder / RECORDER):
        raise SettingsError(
            f"no key set in {folder}: it has no {RECORDER}; make one with refocus keys new {folder}"
        )
    table = _read_secret(folder / RECORDER, "public", "secret")
    return RecorderKey(table["public"], table["secret"])


def read_worker(path: Path) -> WorkerKey:
    """A worker's key file. Raises SettingsError where it is missing, damaged or open to others."""
    if not _is_file(path):
        raise SettingsError(
            f"no key file {path}; it is made where the recorder is, with refocus keys add, and "
            "moved here"
        )
    table = _read_secret(path, "name", "public", "secret", "recorder")
    return WorkerKey(**table)


def allowed(folder: Path) -> dict[str, str]:
    """Names of the workers that may connect, by their public keys.

    A file that is damaged, just being written, or not ours to read lets nobody in, and so does a
    folder that is not there. Raises OSError where it is there and cannot be read now.
    """
    found = {}
    try:
        files = [file for file in (folder / WORKERS).iterdir() if file.suffix == ".pub"]
    except FileNotFoundError:
        return {}
    for file in files:
        try:
            found[_read(file, "public")["public"]] = file.stem
        except (FileNotFoundError, PermissionError, SettingsError):
            continue
    return found


def names(folder: Path) -> list[str]:
    """The workers that may connect. Raises SettingsError where that cannot be read."""
    try:
        return sorted(allowed(folder).values())
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be read: {error.strerror}") from error


def show(socket: "zmq.Socket[bytes]", key: WorkerKey) -> None:
    """From its next connect on *socket* proves to be the worker, and talks to its recorder only."""
    socket.curve_publickey = key.public.encode()
    socket.curve_secretkey = key.secret.encode()
    socket.curve_serverkey = key.recorder.encode()


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error


def _public_file(folder: Path, name: str) -> Path:
    return folder / WORKERS / f"{name}.pub"


def _write(path: Path, comment: str, table: dict[str, str]) -> None:
    # Z85 has neither ' nor \, so that a TOML literal string holds it as it is.
    lines = [comment, *(f"{key} = '{value}'" for key, value in table.items())]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")


def _read_secret(path: Path, *wanted: str) -> dict[str, str]:
    try:
        mode = path.stat().st_mode
        if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
            raise SettingsError(
                f"{path} holds a secret and can be read by other users (mode "
                f"{stat.S_IMODE(mode):04o}); make it yours alone: chmod 600 {path}"
            )
        table = _read(path, *wanted)
        public = zmq.curve_public(table["secret"].encode()).decode()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except zmq.ZMQError:
        public = ""  # not Z85
    if public != table["public"]:
        raise SettingsError(f"{path} is damaged: its two halves do not belong together")
    return table


def _read(path: Path, *wanted: str) -> dict[str, str]:
    damaged = SettingsError(
        f"{path} is no key file of Refocus, or damaged; it should say {', '.join(wanted)}"
    )
    try:
        table = tomllib.loads(path.read_bytes().decode("ascii"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise damaged from None
    if set(table) != set(wanted) or not all(isinstance(text, str) for text in table.values()):
        raise damaged
    keys = (table[word] for word in wanted if word != "name")
    if not all(len(key) == 40 and key.isascii() for key in keys):
        raise damaged
    return table
