"""Files that are known to be our own: an HMAC under a key that never leaves this computer.

For what is code in disguise: TensorRT's plans, RTX's cache of compiled kernels. Each file starts
with an HMAC-SHA256 over its name and content; `read_sealed` checks it on the very bytes that it
hands on, so nothing can be exchanged in between, and a file under another name is not that file.

The key is made on first use and lies in the user's data folder, not beside what it seals. On POSIX
its mode is 0600; a key that others may read, or that is not ours, is refused. On Windows a mode
means nothing: there the key is as safe as the user's profile, whose access list names the user,
the system and administrators; nothing is checked.

Files appear whole and durable or not at all (engine/files.py).
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import sys
from pathlib import Path

import platformdirs

from engine.files import sync_folder, write_partial, write_whole
from refocus.errors import SettingsError

_MAGIC = b"refocus sealed 1"
_SEAL_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_KEY_BYTES = 32


def read_sealed(path: Path) -> bytes | None:
    """What `write_sealed` put there on this computer; None where it is missing or not that.

    Raises SettingsError for a key that is not safe.
    """
    key = _key()
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    content = sealed[_SEAL_BYTES:]
    right = hmac.compare_digest(sealed[:_SEAL_BYTES], _seal(key, path.name, content))
    return content if right else None


def write_sealed(path: Path, content: bytes) -> None:
    """Put *content* at *path* with its HMAC: whole, durable, or not at all. Raises OSError."""
    key = _key()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, _seal(key, path.name, content) + content)


def _seal(key: bytes, name: str, content: bytes) -> bytes:
    code = hmac.new(key, _MAGIC + name.encode() + b"\0", hashlib.sha256)
    code.update(content)
    return _MAGIC + code.digest()


def _key() -> bytes:
    """This user's key on this computer, made where there is none."""
    path = platformdirs.user_data_path("refocus") / "plan.key"
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        if not path.exists():
            _make_key(path)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise SettingsError(
            f"the key of the plan cache {path} cannot be made or read: {error.strerror}; "
            "TensorRT is not used without it"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        _check_owner(os.fstat(descriptor), path)
        key = file.read()
    if len(key) != _KEY_BYTES:
        raise SettingsError(
            f"the key of the plan cache {path} has {len(key)} bytes, wanted {_KEY_BYTES}; remove "
            "it: a new one is made, and plans are built anew"
        )
    return key


def _check_owner(status: os.stat_result, path: Path) -> None:
    if sys.platform == "win32":
        return
    others = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if status.st_uid != os.geteuid() or others or not stat.S_ISREG(status.st_mode):
        raise SettingsError(
            f"the key of the plan cache {path} must be a file that only you can read "
            f"(mode 0600), it is of user {status.st_uid} with mode {status.st_mode & 0o7777:04o}: "
            "others may have made plans with it; remove it and the plans"
        )


def _make_key(path: Path) -> None:
    """A new key at *path*, unless another process was faster: whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = write_partial(path, secrets.token_bytes(_KEY_BYTES))
    try:
        with contextlib.suppress(FileExistsError):
            if sys.platform == "win32":
                partial.rename(path)  # there it does not replace
            else:
                path.hardlink_to(partial)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
