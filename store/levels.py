"""The pyramid of one image of a sealed run: arrays "1", "2", ... beside "0", listed when complete.

Levels grow in hidden folders, all in one pass over the planes, and are renamed and then listed in
the image's group when they are whole: the run is valid at every moment. Levels that were made of
other planes than the journal has now (a later `refocus fill`) are unlisted, then made anew.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refocus.errors import RunError
from store import disk, pyramid
from store.packing import Block, Packed, Source, blocks, made_from, within


def shapes(source: Source) -> list[tuple[int, int]]:
    """(y, x) of levels 1, 2, ...; none for small planes, and for an image without a plane."""
    y, x = source.array.shape[3:]
    return pyramid.level_shapes(y, x)[1:] if source.planes else []


def are_built(source: Source) -> bool:
    """Whether all levels are there and listed."""
    count = len(shapes(source))
    whole = all(made_from(_level(source, k)) == source.digest for k in range(1, count + 1))
    return whole and len(_datasets(_group(source.folder))) == count + 1


def are_missing(folder: Path) -> bool:
    """Whether an image's group can be read and lists a level that is not there."""
    try:
        names = [dataset["path"] for dataset in _datasets(_group(folder))[1:]]
    except (RunError, KeyError, TypeError):
        return False
    return any(not (folder / name / "zarr.json").is_file() for name in names)


def build(source: Source, tell: Callable[[], None]) -> None:
    """Make what is missing; *tell* is called for every plane. Raises OSError, RunError."""
    wanted = shapes(source)
    missing = [
        k for k in range(1, len(wanted) + 1) if made_from(_level(source, k)) != source.digest
    ]
    if missing:
        unlist(source.folder)
        for k in missing:
            disk.remove_tree(_level(source, k))
        _make(source, {k: wanted[k - 1] for k in missing}, tell)
    _list(source.folder, len(wanted))


def unlist(folder: Path) -> bool:
    """Let an image's group list level 0 alone, before its planes change; True where it did not."""
    return _list(folder, 0)


def _make(source: Source, levels: dict[int, tuple[int, int]], tell: Callable[[], None]) -> None:
    largest = shapes(source)[0]
    packed = {
        k: Packed.begin(_partial(source, k), source, shape, largest, ".")
        for k, shape in levels.items()
    }
    for block in blocks(source, largest):
        if not all(level.has(block) for level in packed.values()):
            _make_block(source, block, packed)
        for _ in block.slots:
            tell()
    for k, level in packed.items():
        disk.sync_tree(level.path)
        disk.rename(level.path, _level(source, k))
    disk.sync(source.folder)


def _make_block(source: Source, block: Block, packed: dict[int, Packed]) -> None:
    planes = {k: level.empty(block) for k, level in packed.items()}
    for slot in block.slots:
        plane = source.read(slot)
        for k in range(1, max(packed) + 1):
            plane = pyramid.halved(plane)
            if k in planes:
                planes[k][within(block, slot)] = plane
    for k, level in packed.items():
        level.put(block, planes[k])


def _level(source: Source, level: int) -> Path:
    return source.folder / str(level)


def _partial(source: Source, level: int) -> Path:
    return source.folder / f".{level}.partial"


def _group(folder: Path) -> Any:
    """What an image's group says. Raises RunError where it cannot be read."""
    path = folder / "zarr.json"
    try:
        group = json.loads(path.read_bytes())
        _datasets(group)[0]["path"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{path}: cannot be read ({error}); run `refocus recover`") from error
    return group


def _datasets(group: Any) -> Any:
    return group["attributes"]["ome"]["multiscales"][0]["datasets"]


def _list(folder: Path, levels: int) -> bool:
    """List level 0 and so many others in the image's group; False where it was so. OSError."""
    group = _group(folder)
    scale = _datasets(group)[0]["coordinateTransformations"][0]["scale"]
    datasets = pyramid.datasets(scale, levels + 1)
    if _datasets(group) == datasets:
        return False
    group["attributes"]["ome"]["multiscales"][0]["datasets"] = datasets
    disk.replace_file(folder / "zarr.json", json.dumps(group, indent=1).encode())
    disk.sync(folder / "zarr.json")
    disk.sync(folder)
    return True
