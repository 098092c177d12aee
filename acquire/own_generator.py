"""Which generator a run is refocused with by default: its own, as its journal tells.

The latest plane refocused live names it, else the event of the one that came into use last, else
the first one that the run notes; a run that notes none says by its settings which one it wanted. A
damaged line of the journal is as one that is not there. The package is looked up by its hash, among
all that ship or are installed and where the settings say: a damaged copy leaves the others to try.
"""

import contextlib
from typing import NamedTuple

from engine import model_store, package
from engine.package import Package
from refocus.errors import PackageError
from refocus.settings import EngineSettings
from store.reader import Run
from store.records import Kind

IN_USE = "generator_in_use"
"""The event of a recording that says which generator gets its frames from now on."""
FILLED_WITH = "filled_with"
"""The event that says with which generator its missing twins are made."""


def own_package(run: Run) -> Package:
    """The generator that *run* had last while it was recorded; where none worked, it was set to.

    Raises PackageError where it is not on this computer as it was.
    """
    named = str(settings_of(run, "engine").get("generator") or EngineSettings().generator)
    own = _own_generator(run)
    if own is None:
        return package.load(model_store.find(named))
    places = model_store.find_by_hash(own.package_hash)
    with contextlib.suppress(PackageError):
        places.append(model_store.find(named))
    damaged = ""
    for folder in places:
        try:
            found = package.load(folder)
        except PackageError as error:
            damaged = damaged or f" ({error})"
            continue
        if found.hash == own.package_hash:
            return found
    raise PackageError(
        f"{run.path} was recorded with {own.name} {own.version} ({own.package_hash[:12]}), which "
        f"neither ships, nor is installed here, nor lies at {named!r}; name its folder, or another "
        f"generator, with --generator{damaged}"
    )


class _Own(NamedTuple):
    """The generator that a run is to be filled with."""

    package_hash: str
    name: str
    version: str


def _own_generator(run: Run) -> _Own | None:
    """That of the latest plane refocused live; a plane that was filled waited for nobody.

    Where there is none, or its line is damaged, that which came into use last.
    """
    lines = run.notes.generators
    live = [r for r in run.records(Kind.REFOCUS) if r.generator and r.latency_ns]
    latest = max(live, key=lambda record: record.seq, default=None)
    line = lines.get(latest.generator) if latest else None
    if line is None and (used := _last_in_use(run)):
        return used
    line = line or min(lines.values(), key=lambda found: found.number, default=None)
    return _Own(line.package_hash, line.name, line.version) if line else None


def _last_in_use(run: Run) -> _Own | None:
    for event in reversed(run.notes.events):
        told = [event.fields.get(key) for key in _Own._fields]
        if event.event == IN_USE and all(isinstance(value, str) for value in told):
            return _Own(*map(str, told))
    return None


def settings_of(run: Run, section: str) -> dict[str, object]:
    """A section of the settings that the run was recorded with, as they were written then."""
    found = run.notes.info.settings.get(section) if run.notes.info else None
    return found if isinstance(found, dict) else {}
