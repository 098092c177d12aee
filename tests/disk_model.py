"""A file system that follows recorded calls, and what a power cut may leave of it.

Files are as they were when last synced, and each write since then is there, missing, or there in
some sectors only; a folder's names are those of its last sync, or any they have had since.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faulty_os import Call

SECTOR = 512


@dataclass
class File:
    """Bytes that are on the disk for sure, and what was done to them since."""

    synced: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, bytes written), or (length, None) where it was cut."""

    def sync(self) -> None:
        """All of it is on the disk."""
        self.synced, self.since = self.content(lambda data: [True] * len(data)), []

    def after_a_cut(self, chance: random.Random, kept: float) -> bytes:
        """What may be found: of the writes since the last sync every sector with luck *kept*."""
        whole = chance.random() < 0.5  # writes are there or not; otherwise sectors are
        rubbish = chance.random() < 0.2

        def keep(sectors: list[int]) -> list[bool]:
            luck = chance.random() < kept
            return [luck if whole else chance.random() < kept for _ in sectors]

        return self.content(keep, chance.randbytes if rubbish else None)

    def content(
        self,
        keep: Callable[[list[int]], list[bool]],
        rubbish: Callable[[int], bytes] | None = None,
    ) -> bytes:
        """Its bytes, with those sectors of each write that *keep* says; the others stay as before.

        What was never on the disk and is not kept at the end of the file is missing, or *rubbish*.
        """
        found = bytearray(self.synced)
        for offset, data in self.since:
            if data is None:
                if all(keep([offset])):
                    del found[offset:]
                continue
            ends = [*range(SECTOR - offset % SECTOR, len(data), SECTOR), len(data)]
            starts = [0, *ends[:-1]]
            for start, end, there in zip(starts, ends, keep(starts), strict=True):
                if rubbish and not there and offset + start == len(found):
                    found += rubbish(end - start)
                elif there:
                    found += bytes(max(0, offset + end - len(found)))
                    found[offset + start : offset + end] = data[start:end]
        return bytes(found)


class Disk:
    """A file system that follows recorded calls, and knows what of it a cut would leave."""

    def __init__(self, folder: Path, found: dict[Path, bytes | None]) -> None:
        """*found*: what lies in *folder* already, for sure."""
        self._names: dict[Path, list[File | str | None]] = {
            folder / name: ["folder" if content is None else File(content)]
            for name, content in found.items()
        }
        """What a path may be after a cut: a file, "folder" or nothing; the last is the newest."""

    def follow(self, call: Call) -> None:
        """Do what the call did."""
        path = call.path
        match call.name:
            case "open" if self._newest(path) is None:
                self._name(path, File())
            case "open":
                self._file(path).since.append((0, None))
            case "pwrite":
                self._file(path).since.append((call.args[2], call.args[1]))
            case "ftruncate":
                self._file(path).since.append((call.args[1], None))
            case "mkdir":
                self._name(path, "folder")
            case "unlink" | "rmdir":
                self._name(path, None)
            case "replace":
                self._name(path, self._newest(Path(call.args[0])))
                self._name(Path(call.args[0]), None)
            case "fsync" | "fdatasync" if isinstance(self._newest(path), File):
                self._file(path).sync()
            case "fsync":
                for name in self._names:
                    if name.parent == path:
                        self._names[name] = self._names[name][-1:]
            case other:
                raise AssertionError(f"{other}({path}) is not known here")

    def leave(self, before: Path, after: Path, chance: random.Random) -> None:
        """Make the folder *after* what a cut may leave of the folder *before*."""
        kept = chance.choice((0.0, 0.5, 0.9, 1.0))
        for path, states in sorted(self._names.items()):
            found = states[-1] if chance.random() < kept else chance.choice(states)
            target = after / path.relative_to(before)
            if found is None or not target.parent.is_dir():
                continue
            if isinstance(found, File):
                target.write_bytes(found.after_a_cut(chance, kept))
            else:
                target.mkdir()

    def _newest(self, path: Path) -> File | str | None:
        return self._names.get(path, [None])[-1]

    def _name(self, path: Path, what: File | str | None) -> None:
        self._names.setdefault(path, [None]).append(what)

    def _file(self, path: Path) -> File:
        file = self._newest(path)
        assert isinstance(file, File), path
        return file
