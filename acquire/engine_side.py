"""The branch as one thing: link and workers, started, replaced and stopped together."""

import contextlib
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from acquire.crew import Crew, seats
from acquire.door import Outside
from acquire.intake import Intake
from acquire.link import Link
from acquire.succession import Succession
from engine import model_store, package
from engine.package import Package
from engine.scaling import Scaling
from refocus import arena, keys
from refocus.errors import PackageError, SettingsError
from refocus.settings import Settings
from store.layout import journal_dir

MAX_IPC_PATH = 90
"""A Unix socket's path may have 107 bytes; what is longer goes over loopback instead."""
_OUTSIDE = re.compile(r"tcp://(\d{1,3}(\.\d{1,3}){3}|localhost):\d{1,5}")
"""What a link for other hosts may be bound to: a network card's own address, not a name."""
LOOPBACK = ("tcp://127.0.0.1:", "tcp://localhost:", "tcp://[::1]:")
PRIVATE = "refocus-link-"
"""Beginning of the name of a private folder; the process that uses it follows."""


class EngineSide:
    """A started engine: the link, and the crew whose generator is in use.

    *run*: the run's folder. *scalings*: those that it has already, by channel. *expected_shape*
    (y, x): workers get ready for it before the first frame. *filling*: the run is recorded already.
    Raises EngineError where the link cannot listen.
    """

    def __init__(
        self,
        settings: Settings,
        intake: Intake,
        run: Path,
        expected_shape: tuple[int, int] | None,
        on_trouble: Callable[[str], None],
        scalings: Mapping[str, Scaling],
        filling: bool = False,
    ) -> None:
        self._settings = settings
        self._intake = intake
        self._logs = journal_dir(run)
        self._expected_shape = expected_shape
        self._on_trouble = on_trouble
        self._secret = secrets.token_hex(16)
        self._crews: list[Crew] = []
        self._succession: Succession | None = None
        self._lock = threading.Lock()
        """Held to change `crew`, and to say that there is no engine because of it."""
        self.crew: Crew | None = None
        """That whose generator is in use; None while there is none that can be used."""
        self.changed = threading.Event()
        """Set when a worker has introduced itself or was given up."""
        with contextlib.ExitStack() as closing:
            self.link = Link(
                intake,
                settings,
                scalings,
                address=_address(settings, closing),
                outside=_outside(settings),
                secret=self._secret,
                on_ready=self._introduced,
                on_gone=self._kill,
                on_trouble=on_trouble,
                filling=filling,
            )
            self._closing = closing.pop_all()

    @property
    def package(self) -> Package | None:
        """The generator in use."""
        return self.crew.package if self.crew else None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers in use that run on this computer."""
        return self.crew.pids if self.crew else []

    @property
    def hopeless(self) -> bool:
        """No worker is left and none will be started any more."""
        return all(crew.hopeless for crew in list(self._crews)) and not self.link.workers

    def prepare(self, package: Package) -> Crew:
        """Starts workers for *package*, which compile for the latest frame and then wait."""
        crew = self._make(package)
        self.link.let_in(package)
        crew.start()
        return crew

    def use(self, crew: Crew) -> None:
        """From the next frame on this crew works; the one before finishes what it has."""
        with self._lock:
            if self.crew is not None:
                self.crew.retire()
            self.crew = crew
            self._intake.no_engine = ""
        self.link.use(crew.package)
        for device, reason in list(crew.given_up.items()):
            self._on_trouble(f"no worker on device {device}: {reason}")

    def begin(self, package: Package) -> None:
        """Starts workers for *package* and gives them the frames as soon as they are ready."""
        crew = self._make(package)
        self.use(crew)
        crew.start()

    def drop(self, crew: Crew) -> None:
        """Ends a crew that is not in use."""
        self.link.turn_away(crew.package)
        crew.close()
        with contextlib.suppress(ValueError):  # dropped before
            self._crews.remove(crew)

    def follow(self, seen: tuple[int, ...]) -> None:
        """From now on the generator that is chosen takes over; *seen*: the store's stamp by now."""
        patience_s = self._settings.engine.warmup_timeout_ms / 1000
        self._succession = Succession(self, seen, patience_s, self._on_trouble)

    def close(self) -> None:
        """Stops link and workers; every frame they still had is answered for."""
        if self._succession is not None:
            self._succession.close()
        self.link.close()  # first: it tells the workers to leave
        for crew in list(self._crews):  # the succession may still be dropping one
            crew.close()
        self._closing.close()

    def _make(self, package: Package) -> Crew:
        crew = Crew(
            package,
            self._settings,
            seats(self._settings),
            address=self.link.address,
            secret=self._secret,
            warm=self.link.latest_shape or self._expected_shape,
            logs=self._logs,
            on_event=self._heard,
        )
        self._crews.append(crew)
        return crew

    # -- link's thread ---------------------------------------------------------------------------

    def _introduced(self, pid: int) -> None:
        for crew in list(self._crews):
            crew.introduced(pid)
        self.changed.set()

    def _kill(self, pid: int, reason: str) -> None:
        for crew in list(self._crews):
            crew.kill(pid, reason)

    # -- a supervisor's thread -------------------------------------------------------------------

    def _heard(self, crew: Crew, kind: str, fields: dict[str, object]) -> None:
        self._intake.note(lambda writer: writer.note_event(kind, **fields))
        if kind != "worker_given_up":
            return
        with self._lock:
            if crew is self.crew:
                self._tell(crew, fields)
        self.changed.set()

    def _tell(self, crew: Crew, fields: dict[str, object]) -> None:
        if not crew.hopeless:
            self._on_trouble(f"no worker on device {fields['device']}: {fields['reason']}")
            return
        reason = f"the worker cannot run: {fields['reason']}"
        self._on_trouble(f"no refocusing: {reason}")
        if self.link.workers == 0 and not self._settings.link.keys:
            self._intake.no_engine = reason


def check_address(settings: Settings) -> None:
    """Raises SettingsError for an address that is not ours to open without keys, or bad keys."""
    wanted = settings.link.address
    if settings.link.keys:
        keys.read_recorder(Path(settings.link.keys))
        if not _OUTSIDE.fullmatch(wanted):
            raise SettingsError(
                f"[link] keys lets workers on other hosts in, but address = {wanted!r} is not for "
                'them, wanted tcp://IPv4:PORT: say address = "tcp://0.0.0.0:5577" for every '
                'network card, or keys = "" where there are no such workers'
            )
    elif wanted != "auto" and not wanted.startswith(LOOPBACK):
        raise SettingsError(
            f"[link] address = {wanted!r}: without keys only loopback (tcp://127.0.0.1:PORT) can "
            "be opened; for workers on other hosts make keys (refocus keys --help) and name their "
            "folder in [link] keys, else use auto"
        )


def start_engine(
    settings: Settings,
    intake: Intake,
    run: Path,
    expected_shape: tuple[int, int] | None,
    on_trouble: Callable[[str], None],
    *,
    scalings: Mapping[str, Scaling] | None = None,
    filling: bool = False,
) -> EngineSide | None:
    """Starts link and workers, or returns None where the settings want no engine.

    *scalings*: those that the *run* has already, by channel. *filling*: it is recorded already.
    Where the settings want the current generator, one that is chosen later takes over, also from
    one that cannot be used. Raises PackageError for another that cannot be used, EngineError where
    the link cannot listen.
    """
    if settings.engine.runtime == "none":
        return None
    follows = settings.engine.generator == model_store.CURRENT
    seen = model_store.stamp()
    try:
        loaded = package.load(model_store.find(settings.engine.generator))
    except PackageError as error:
        if not follows:
            raise
        loaded, intake.no_engine = None, str(error)
        on_trouble(f"recording raw only until another generator is chosen: {error}")
    engine = EngineSide(settings, intake, run, expected_shape, on_trouble, scalings or {}, filling)
    try:
        if loaded is not None:
            engine.begin(loaded)
        if follows:
            engine.follow(seen)
    except BaseException:
        engine.close()
        raise
    return engine


def _outside(settings: Settings) -> Outside | None:
    link = settings.link
    return Outside(link.address, Path(link.keys)) if link.keys else None


def _address(settings: Settings, closing: contextlib.ExitStack) -> str:
    """For workers on this computer."""
    _sweep()
    if settings.link.address != "auto" and not settings.link.keys:
        return settings.link.address
    # Mode 0700: only this user gets in.
    private = Path(tempfile.mkdtemp(prefix=f"{PRIVATE}{os.getpid()}-"))
    closing.callback(shutil.rmtree, private, ignore_errors=True)
    usable = sys.platform != "win32" and len(os.fsencode(private / "link")) <= MAX_IPC_PATH
    return f"ipc://{private / 'link'}" if usable else "tcp://127.0.0.1:*"


def _sweep() -> None:
    """Removes what recorders that were killed left: shared memory, folders of sockets."""
    arena.sweep()
    for folder in Path(tempfile.gettempdir()).glob(f"{PRIVATE}*-*"):
        pid = folder.name.removeprefix(PRIVATE).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
