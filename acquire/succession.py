"""Follows which generator is the current one, and lets a newly chosen one take over during a run.

`refocus models use` and `rollback` change a small file; this looks at it once a second. What was
chosen is checked, its workers are started beside those that work, and compile, which may take
minutes. When they are ready the link hands the next frame to them. The workers of the one before
finish what they have and leave. Meanwhile both are in memory, and share what they compute with.

A generator that cannot be used is told once, and the one before goes on. Where the store itself
could not be read (a network drive that is away for a moment), it is looked at again until it can.
Choosing again while one is getting ready drops that; choosing the one that works already does just
that. Where that one has lost its workers for good, choosing it again starts new ones.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from acquire.crew import Crew
from engine import model_store, package
from engine.package import Package
from refocus.errors import PackageError

if TYPE_CHECKING:
    from acquire.engine_side import EngineSide

LOOK_S = 1.0
CLOSE_S = 5.0
"""A store on a network drive that hangs must not keep a run from being closed."""


class Succession:
    """Begins to follow; *seen*: the store's stamp from before the generator in use was loaded.

    *ready_within_s*: how long new workers may take. `close` ends it before the *engine*.
    """

    def __init__(
        self,
        engine: "EngineSide",
        seen: tuple[int, ...],
        ready_within_s: float,
        on_trouble: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._seen = seen
        self._ready_within_s = ready_within_s
        self._on_trouble = on_trouble
        self._look_again = engine.package is None  # why is told, and may be over in a moment
        self._told = ""
        self._wanted: Package | None = None
        self._candidate: Crew | None = None
        self._deadline = 0.0
        self._leaving: list[Crew] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refocus-succession", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Crews that are getting ready, or leaving, stay to be closed with the engine."""
        self._stopping.set()
        self._engine.changed.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._surviving():
                self._see_off()
                self._advance()
            self._engine.changed.wait(LOOK_S)
            self._engine.changed.clear()
            with self._surviving():
                self._look()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Tell what goes wrong within: whoever chooses later must still be heard."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - see above
            self._on_trouble(f"a newly chosen generator cannot be followed now: {error!r}")

    def _look(self) -> None:
        stamp = model_store.stamp()
        changed = stamp != self._seen
        if not stamp or not (changed or self._look_again):  # no command takes the stamp away
            return
        self._seen, self._look_again = stamp, False
        wanted, reason = None, ""
        try:
            wanted = package.load(model_store.find(model_store.CURRENT))
        except (PackageError, OSError) as error:
            reason, self._look_again = str(error), _may_pass(error)
        if reason and (changed or self._told not in ("", reason)):
            self._refuse("the generator that was chosen", reason)
            self._told = reason
        if not self._look_again:
            self._choose(wanted)

    def _choose(self, wanted: Package | None) -> None:
        candidate = self._candidate
        if candidate is not None:
            if wanted is not None and wanted.hash == candidate.package.hash:
                return
            self._candidate = None
            self._drop(candidate)
        works = self._is_in_use(wanted) and not self._engine.hopeless
        self._wanted = None if works else wanted

    def _see_off(self) -> None:
        for crew in list(self._leaving):
            if not self._engine.link.workers_of(crew.package):
                self._leaving.remove(crew)
                self._engine.drop(crew)

    def _advance(self) -> None:
        candidate, wanted = self._candidate, self._wanted
        if candidate is not None:
            late = time.monotonic() > self._deadline
            if candidate.ready or (late and self._engine.link.workers_of(candidate.package)):
                self._take_over(candidate)
            elif candidate.hopeless or late:
                self._fail(candidate)
        elif wanted is not None and not self._leaves(wanted):
            self._wanted = None
            self._candidate = self._engine.prepare(wanted)
            self._deadline = time.monotonic() + self._ready_within_s

    def _leaves(self, wanted: Package) -> bool:
        """The link tells generators apart, not crews: the first must be gone before the second."""
        return any(crew.package.hash == wanted.hash for crew in self._leaving)

    def _take_over(self, candidate: Crew) -> None:
        before = self._engine.crew
        again = self._is_in_use(candidate.package)
        self._engine.use(candidate)
        if before is not None and not again:  # else its workers are gone
            self._leaving.append(before)
        self._candidate = None

    def _fail(self, candidate: Crew) -> None:
        late = f"its workers were not ready within {self._ready_within_s:g} s"
        manifest = candidate.package.manifest
        reason = next(iter(candidate.given_up.values()), late)
        self._refuse(f"generator {manifest.name} {manifest.version}", reason)
        self._candidate = None
        self._drop(candidate)

    def _drop(self, candidate: Crew) -> None:
        self._engine.drop(candidate)
        if self._is_in_use(candidate.package):  # the link tells generators apart, not crews
            self._engine.link.let_in(candidate.package)

    def _is_in_use(self, wanted: Package | None) -> bool:
        in_use = self._engine.package
        return wanted is not None and in_use is not None and wanted.hash == in_use.hash

    def _refuse(self, what: str, reason: str) -> None:
        in_use = None if self._engine.hopeless else self._engine.package
        instead = f"{in_use.manifest.name} goes on" if in_use else "recording raw only"
        self._on_trouble(f"{what} cannot be used, {instead}: {reason}")


def _may_pass(error: Exception) -> bool:
    """Whether it is the store, not the generator: it could not be read, though it is there."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
