"""The branch as one thing: model package, link, supervised worker; started and stopped together."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from acquire.intake import Intake
from acquire.link import Link
from acquire.supervisor import Supervisor, worker_arguments
from engine import package
from engine.package import Package
from refocus.errors import SettingsError
from refocus.settings import Settings

MAX_IPC_PATH = 90
"""A Unix socket's path may have 107 bytes; what is longer goes over loopback instead."""
LOOPBACK = ("tcp://127.0.0.1:", "tcp://localhost:", "tcp://[::1]:")


@dataclass(frozen=True, slots=True)
class EngineSide:
    """A started engine."""

    package: Package
    link: Link
    supervisor: Supervisor
    private_folder: Path

    def close(self) -> None:
        """Stops link and worker; every frame they still had is answered for."""
        self.link.close()
        self.supervisor.close()
        shutil.rmtree(self.private_folder, ignore_errors=True)


def start_engine(
    settings: Settings,
    intake: Intake,
    run: Path,
    expected_shape: tuple[int, int] | None,
    on_trouble: Callable[[str], None],
) -> EngineSide | None:
    """Starts link and worker, or returns None where the settings want no engine.

    Raises PackageError for an unusable generator, SettingsError for an address that is not ours to
    open, both before anything is started.
    """
    if settings.engine.runtime == "none":
        return None
    loaded = package.load(package.find(settings.engine.generator))
    secret = secrets.token_hex(16)
    private = Path(tempfile.mkdtemp(prefix="refocus-"))  # mode 0700: only this user gets in
    address = _address(settings.link.address, private)

    def event(kind: str, fields: dict[str, object]) -> None:
        intake.note(lambda writer: writer.note_event(kind, **fields))
        if kind == "worker_given_up":
            on_trouble(f"no refocusing: the worker cannot run: {fields['last_words']}")

    link = Link(
        intake,
        settings,
        loaded,
        address=address,
        secret=secret,
        on_gone=lambda pid, reason: supervisor.kill(pid, reason),
    )
    arguments = worker_arguments(link.address, loaded.folder, settings, expected_shape)
    supervisor = Supervisor(arguments, secret, run / "journal" / "worker.log", event)
    return EngineSide(loaded, link, supervisor, private)


def _address(wanted: str, private: Path) -> str:
    if wanted == "auto":
        socket = private / "link"
        usable = sys.platform != "win32" and len(os.fsencode(socket)) <= MAX_IPC_PATH
        return f"ipc://{socket}" if usable else "tcp://127.0.0.1:*"
    if wanted.startswith(LOOPBACK):
        return wanted
    raise SettingsError(
        f"[link] address = {wanted!r}: only loopback (tcp://127.0.0.1:PORT) can be opened without "
        "keys, and this version of Refocus has none; use auto"
    )
