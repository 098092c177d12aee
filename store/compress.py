"""Compresses the planes of one image of a sealed run, in place, and never without a whole copy.

The compressed array grows in a hidden folder. Every block is decoded again and held against the
journal's checksums. Then its shards move into the array's folder, where their names ("c/0/0/...")
differ from those of the old ones ("c.0.0..."), and one replaced file, the array's zarr.json,
turns every reader from the old to the new. Only then the old shards go. A kill at any moment leaves
the old array or the new one; the next `refocus finish` ends what was begun.

A program that has the run open meanwhile must open it again.
"""

from collections.abc import Callable
from pathlib import Path

from refocus.errors import RunError
from store import disk
from store.packing import Block, Packed, Source, blocks, made_from, within
from store.records import crc32c


def is_compressed(source: Source) -> bool:
    """Whether nothing is left to do."""
    return not source.planes or (_is_switched(source) and not _leftovers(source))


def compress(source: Source, tell: Callable[[], None]) -> None:
    """Do it; *tell* is called for every plane. Raises OSError, RunError."""
    if not _is_switched(source):
        _take_back(source)
        _pack(source, tell)
        _switch(source)
    for path in _leftovers(source):
        if path.is_dir():
            disk.remove_tree(path)
        else:
            disk.remove(path)


def compressed_bytes(source: Source) -> int:
    """Length of all compressed shards."""
    return sum(path.stat().st_size for path in (_array(source) / "c").rglob("*") if path.is_file())


def _pack(source: Source, tell: Callable[[], None]) -> None:
    y, x = source.array.shape[3:]
    packed = Packed.begin(_partial(source), source, (y, x), (y, x), "/")
    for block in blocks(source, (y, x)):
        if not packed.has(block):
            planes = packed.empty(block)
            for slot in block.slots:
                planes[within(block, slot)] = source.read(slot)
            packed.put(block, planes)
        _verify(source, packed, block)
        for _ in block.slots:
            tell()
    disk.sync_tree(packed.path)


def _verify(source: Source, packed: Packed, block: Block) -> None:
    planes = packed.read(block)
    for slot in block.slots:
        if crc32c(planes[within(block, slot)]) != source.planes[slot]:
            disk.remove_tree(packed.path)
            raise RunError(
                f"{source.name(slot)} came back changed from the compressed copy; the copy is "
                "removed, the run is as it was; try again, and check disk and memory"
            )


def _switch(source: Source) -> None:
    array, partial = _array(source), _partial(source)
    if (partial / "c").exists():  # not where every plane is black
        disk.rename(partial / "c", array / "c")
        disk.sync(array)
    disk.replace_file(array / "zarr.json", (partial / "zarr.json").read_bytes())
    disk.sync(array / "zarr.json")
    disk.sync(array)


def _take_back(source: Source) -> None:
    """Undo a move after which the kill came before the switch."""
    moved, partial = _array(source) / "c", _partial(source)
    if moved.exists() and made_from(partial) == source.digest and not (partial / "c").exists():
        disk.rename(moved, partial / "c")
    disk.remove_tree(moved)


def _is_switched(source: Source) -> bool:
    return made_from(_array(source)) is not None


def _leftovers(source: Source) -> list[Path]:
    """What a compressed array does not need."""
    old = [path for path in _array(source).iterdir() if path.name.startswith("c.")]
    return old + ([_partial(source)] if _partial(source).exists() else [])


def _array(source: Source) -> Path:
    return source.folder / "0"


def _partial(source: Source) -> Path:
    return source.folder / ".0.partial"
