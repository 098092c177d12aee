"""Follows which generator is the current one, and lets a newly chosen one take over during a run.

`refocus models use` and `rollback` change a small file; this looks at it once a second. What was
chosen is checked, its workers are started beside those that work, and compile, which may take
minutes. When they are ready the link hands the next frame to them. The workers of the one before
finish what they have and leave. Meanwhile both are in memory, and share what they compute with.

A generator that cannot be used is told once, and the one before goes on. Choosing again while one
is getting ready drops that; choosing the one that works already does just that.
"""

import threading
import time
from collections.abc import Callable
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
            self._see_off()
            self._advance()
            self._engine.changed.wait(LOOK_S)
            self._engine.changed.clear()
            self._look()

    def _look(self) -> None:
        stamp = model_store.stamp()
        if stamp == self._seen:
            return
        self._seen, wanted, in_use = stamp, None, self._engine.package
        try:
            wanted = package.load(model_store.find(model_store.CURRENT))
        except PackageError as error:
            self._refuse("the generator that was chosen", str(error))
        if self._candidate is not None:
            if wanted is not None and wanted.hash == self._candidate.package.hash:
                return
            self._engine.drop(self._candidate)
            self._candidate = None
        same = wanted is not None and in_use is not None and wanted.hash == in_use.hash
        self._wanted = None if same else wanted

    def _see_off(self) -> None:
        for crew in list(self._leaving):
            if not self._engine.link.workers_of(crew.package):
                self._engine.drop(crew)
                self._leaving.remove(crew)

    def _advance(self) -> None:
        candidate, wanted = self._candidate, self._wanted
        if candidate is not None:
            late = time.monotonic() > self._deadline
            if candidate.ready or (late and self._engine.link.workers_of(candidate.package)):
                self._take_over(candidate)
            elif candidate.hopeless or late:
                self._fail(candidate)
        elif wanted is not None and not self._leaves(wanted):
            self._candidate = self._engine.prepare(wanted)
            self._deadline = time.monotonic() + self._ready_within_s

    def _leaves(self, wanted: Package) -> bool:
        """The link tells generators apart, not crews: the first must be gone before the second."""
        return any(crew.package.hash == wanted.hash for crew in self._leaving)

    def _take_over(self, candidate: Crew) -> None:
        before = self._engine.crew
        self._engine.use(candidate)
        if before is not None:
            self._leaving.append(before)
        self._candidate = self._wanted = None

    def _fail(self, candidate: Crew) -> None:
        late = f"its workers were not ready within {self._ready_within_s:g} s"
        manifest = candidate.package.manifest
        reason = next(iter(candidate.given_up.values()), late)
        self._refuse(f"generator {manifest.name} {manifest.version}", reason)
        self._candidate = self._wanted = None
        self._engine.drop(candidate)

    def _refuse(self, what: str, reason: str) -> None:
        in_use = self._engine.package
        instead = f"{in_use.manifest.name} goes on" if in_use else "recording raw only"
        self._on_trouble(f"{what} cannot be used, {instead}: {reason}")
