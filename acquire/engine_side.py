"""The branch as one thing: model package, link, supervised worker; started and stopped together."""

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from acquire.intake import Intake
from acquire.link import Link
from acquire.supervisor import Supervisor, worker_arguments
from engine import package
from engine.package import Package
from engine.scaling import Scaling
from refocus.errors import SettingsError
from refocus.settings import Settings
from store.layout import journal_dir

MAX_IPC_PATH = 90
"""A Unix socket's path may have 107 bytes; what is longer goes over loopback instead."""
LOOPBACK = ("tcp://127.0.0.1:", "tcp://localhost:", "tcp://[::1]:")
PRIVATE = "refocus-link-"
"""Beginning of the name of a private folder; the process that uses it follows."""


@dataclass(frozen=True, slots=True)
class EngineSide:
    """A started engine."""

    package: Package
    link: Link
    supervisor: Supervisor
    _closing: contextlib.ExitStack

    @property
    def hopeless(self) -> bool:
        """No worker is left and none will be started any more."""
        return self.supervisor.gave_up.is_set() and not self.link.workers

    def close(self) -> None:
        """Stops link and worker; every frame they still had is answered for."""
        self._closing.close()


def check_address(settings: Settings) -> None:
    """Raises SettingsError for an address that is not ours to open without keys."""
    wanted = settings.link.address
    if wanted != "auto" and not wanted.startswith(LOOPBACK):
        raise SettingsError(
            f"[link] address = {wanted!r}: only loopback (tcp://127.0.0.1:PORT) can be opened "
            "without keys, and this version of Refocus has none; use auto"
        )


def start_engine(
    settings: Settings,
    intake: Intake,
    run: Path,
    expected_shape: tuple[int, int] | None,
    on_trouble: Callable[[str], None],
    *,
    scalings: Mapping[str, Scaling] | None = None,
) -> EngineSide | None:
    """Starts link and worker, or returns None where the settings want no engine.

    *scalings*: those that the *run* has already, by channel.
    Raises PackageError for an unusable generator, EngineError where the link cannot listen.
    """
    if settings.engine.runtime == "none":
        return None
    loaded = package.load(package.find(settings.engine.generator))
    secret = secrets.token_hex(16)

    def event(kind: str, fields: dict[str, object]) -> None:
        intake.note(lambda writer: writer.note_event(kind, **fields))
        if kind == "worker_given_up":
            reason = f"the worker cannot run: {fields['reason']}"
            on_trouble(f"no refocusing: {reason}")
            if link.workers == 0:
                intake.no_engine = reason

    with contextlib.ExitStack() as closing:
        link = Link(
            intake,
            settings,
            loaded,
            scalings or {},
            address=_address(settings, closing),
            secret=secret,
            on_ready=lambda pid: supervisor.introduced(pid),
            on_gone=lambda pid, reason: supervisor.kill(pid, reason),
            on_trouble=on_trouble,
        )
        supervisor = Supervisor(
            worker_arguments(link.address, loaded.folder, settings, expected_shape),
            secret,
            journal_dir(run) / "worker.log",
            settings.engine.warmup_timeout_ms / 1000,
            event,
        )
        closing.callback(supervisor.close)
        closing.callback(link.close)  # first: it tells the workers to leave
        return EngineSide(loaded, link, supervisor, closing.pop_all())


def _address(settings: Settings, closing: contextlib.ExitStack) -> str:
    if settings.link.address != "auto":
        return settings.link.address
    _sweep()
    # Mode 0700: only this user gets in.
    private = Path(tempfile.mkdtemp(prefix=f"{PRIVATE}{os.getpid()}-"))
    closing.callback(shutil.rmtree, private, ignore_errors=True)
    usable = sys.platform != "win32" and len(os.fsencode(private / "link")) <= MAX_IPC_PATH
    return f"ipc://{private / 'link'}" if usable else "tcp://127.0.0.1:*"


def _sweep() -> None:
    """Removes what recorders that were killed left in the folder for temporary files."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PRIVATE}*-*"):
        pid = folder.name.removeprefix(PRIVATE).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
