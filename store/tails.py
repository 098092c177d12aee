"""The ends of the journal's files: what a death left behind the last whole entry.

A kill can cut the last entry of a file short. A power cut can also leave zeros or rubbish where the
last entries were, or a file that is empty or not there. What is whole before that stands.

Only the end of a file is ever cut. A damaged entry with whole ones behind it stays where it is,
because records are numbered by their place; readers leave it out.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refocus.errors import RunError
from refocus.words import counted
from store import disk
from store.journal import FRAMES, LINES, LOCK, OUTCOMES, Journal
from store.layout import is_run, journal_dir
from store.lock import WriterLock
from store.reader import OUTCOMES_GONE, Run, open_run
from store.records import (
    RECORD_BYTES,
    file_header,
    read_records,
    sound_records,
    version_of,
)
from store.refused import refused

_NOTHING_LOST = "it acknowledged nothing"


@dataclass(frozen=True)
class Tail:
    """What is wrong at the end of a journal's file, and what makes it whole."""

    path: Path
    whole_bytes: int
    """Where the file should end."""
    said: str
    header: bytes = b""
    """What should stand at its beginning; empty where it does."""
    damaged_records: int = 0
    """Whole records at the end that are damaged: what they acknowledged is not known any more."""


def torn_tails(folder: Path) -> list[Tail]:
    """What is wrong with the ends of the journal in *folder*; writes nothing.

    Raises RunError where outcomes.bin is gone or is no journal: no plane could be told from
    rubbish then, so nothing may be done to them. OSError.
    """
    tails = [_outcomes_tail(folder), *(_lines_tail(folder / name) for name in (FRAMES, LINES))]
    return [tail for tail in tails if tail is not None]


def resume(path: Path) -> tuple[Run, Journal]:
    """A run that was sealed, and its journal open to go on with it.

    Raises LockedError where it has another writer, RunError where its journal has no seal or no
    whole end: `recover` gives it both.
    """
    if not is_run(path):
        raise RunError(f"{path}: not a run (it has no folder journal); give a run's folder")
    folder = journal_dir(path)
    with contextlib.ExitStack() as held:
        try:
            held.callback((lock := WriterLock(folder / LOCK)).release)
            run = open_run(path)
            if run.notes.seal is None or torn_tails(folder):
                raise RunError(f"{path}: was not closed; run `refocus recover` first")
            journal = Journal.reopen(folder, lock, run.all_records.count)
        except OSError as error:
            raise refused(path, "cannot be opened for writing", error) from error
        held.pop_all()
    return run, journal


def cut(tail: Tail) -> None:
    """Make the file whole again. Raises OSError."""
    missing = not tail.path.exists()
    descriptor = disk.open_new(tail.path) if missing else disk.open_existing(tail.path)
    try:
        disk.cut(descriptor, tail.whole_bytes)
        if tail.header:
            disk.write_at(descriptor, tail.header, 0)
    finally:
        disk.close(descriptor)


def _outcomes_tail(folder: Path) -> Tail | None:
    path = folder / OUTCOMES
    if not path.exists() and (folder / FRAMES).exists() and (folder / FRAMES).stat().st_size:
        raise RunError(f"{path} {OUTCOMES_GONE}")
    content = path.read_bytes() if path.exists() else b""
    if len(content) < RECORD_BYTES or file_header().startswith(content.rstrip(b"\0")):
        if content == file_header():
            return None
        said = f"{OUTCOMES}: has not even its first {RECORD_BYTES} bytes; {_NOTHING_LOST}"
        return Tail(path, 0, said, file_header())
    found = sound_records(content)
    header_lost = version_of(content[:RECORD_BYTES]) is None and bool(found.records)
    if not header_lost and not content.startswith(file_header()):
        read_records(path)  # says why: it is no journal, or one of a newer Refocus
    last_sound = max((number for number, _ in found.numbered()), default=-1)
    damaged = found.count - 1 - last_sound
    parts = [
        f"its first {RECORD_BYTES} bytes are damaged" if header_lost else "",
        f"{counted(damaged, 'record')} at its end damaged" if damaged else "",
        f"the last record is torn ({found.torn_bytes} bytes); {_NOTHING_LOST}"
        if found.torn_bytes and not damaged
        else "",
    ]
    if not any(parts):
        return None
    return Tail(
        path,
        whole_bytes=(last_sound + 2) * RECORD_BYTES,
        said=f"{OUTCOMES}: {', '.join(filter(None, parts))}",
        header=file_header() if header_lost else b"",
        damaged_records=damaged,
    )


def _lines_tail(path: Path) -> Tail | None:
    if not path.exists():
        return Tail(path, 0, f"{path.name}: is not there")
    content = path.read_bytes()
    whole = next(_ends_of_sound_lines(content), 0)
    if whole == len(content):
        return None
    return Tail(
        path,
        whole,
        f"{path.name}: its end is torn ({len(content) - whole} bytes); what it spoke of was never "
        "acknowledged",
    )


def _ends_of_sound_lines(content: bytes) -> Iterator[int]:
    """Where whole lines end, the last one first. A line with a zero byte was never written so."""
    end = content.rfind(b"\n") + 1
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if b"\0" not in content[start:end]:
            yield end
        end = start
