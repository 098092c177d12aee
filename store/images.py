"""The images of a run while it is written: arrays and OME metadata, in an order always valid.

Before the first plane of a pair: its two arrays, then its two groups, then the lists of images
(OME/zarr.json, METADATA.ome.xml), then, for the first pair, the root. So whatever is listed is
there, at any moment. Before the first plane of a new channel: both arrays grow, then the labels.
Metadata that become known later (the z step with the second plane of a stack, the sizes at the
end) replace the earlier ones whole.

A step that fails (a full disk) is done again for the next plane.

Planes are put into their slots by a thread of their own, the lane, one after the other: while the
disk takes one plane, the caller sees to the checksum of the next. Whatever else touches the arrays
waits until the lane is empty, so nothing here needs a lock.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from refocus.frame import FrameHeader, Pixels
from store import disk, levels, ome
from store.lane import Lane
from store.layout import Pair, Place, array_dir, image_dir, journal_dir
from store.metadata import PairImages
from store.planes import PlaneArray
from store.shards import Shards

GUESSED_STACK = 16
"""Planes of a stack, where the first frame has a z and nobody said how many follow."""


class Put(NamedTuple):
    """A plane on its way into its slot."""

    stored: Pixels
    """As it will lie on disk."""
    done: "Future[None]"
    unlist: Callable[[], object]
    """Hide it again, where nobody could write down that it is there; whether that goes is not said,
    and for `refocus check` to find out."""


@dataclass
class _PairOnDisk:
    pair: Pair
    raw: PlaneArray
    refocused: PlaneArray
    channels: tuple[ome.Channel, ...] = ()
    z_step_um: float | None = None
    z_known: int = 0
    xml: tuple[str, str] = ("", "")
    stale: bool = True
    """The metadata on disk do not say yet what is known here."""
    finished: bool = False
    """The refocused image may list a pyramid, which would not show a new plane."""

    def images(self) -> tuple[ome.Image, ome.Image]:
        """Both images as they are now."""
        return PairImages(
            self.pair, self.raw, self.refocused, self.channels, self.z_step_um
        ).images()


class Images:
    """All image pairs of one run."""

    def __init__(
        self,
        run: Path,
        placed: list[Pair],
        stack_planes: int | None,
        on_change: Callable[[Path], None],
        on_error: Callable[[OSError], None],
    ) -> None:
        """*placed* are the pairs in order of appearance; the caller appends to it.

        *stack_planes*: planes along z that come one after the other; None: not known.
        *on_change(path)*, from any thread, hears what is not durable as it is now, *on_error* that
        something written earlier may be lost.
        """
        self._run = run
        self._placed = placed
        self._stack_planes = stack_planes
        self._on_change = on_change
        self._shards = Shards(journal_dir(run), on_change, on_error)
        self._pairs: list[_PairOnDisk] = []
        self._lane = Lane("refocus-lane")

    def prepare(self, pair: Pair, header: FrameHeader, plane: Pixels) -> None:
        """Make what must stand on disk before this plane. Raises OSError."""
        while (
            len(self._pairs) <= pair.number
        ):  # also one whose first plane failed: no gap in numbers
            self._add(self._placed[len(self._pairs)], header, plane)
        on_disk = self._pairs[pair.number]
        if len(pair.channel_names) > len(on_disk.channels):
            self._drain()
            self._add_channels(on_disk, header, plane)
        _update_step(on_disk)
        if on_disk.stale:
            self._drain()
            self._save_groups(on_disk)
            self._save_lists()
            on_disk.stale = False

    def put_raw(self, place: Place, pixels: Pixels) -> Put:
        """Begin to store a raw plane that was prepared; what goes wrong is for the result."""
        return self._put(self._pairs[place.pair].raw, place, pixels)

    def put_refocused(self, place: Place, pixels: Pixels) -> Put:
        """Begin to store the twin of a raw plane that is there. Raises OSError, as the result."""
        on_disk = self._pairs[place.pair]
        if on_disk.finished:
            self._unlist_levels(image_dir(self._run, place.refocused_image))
            on_disk.finished = False
        return self._put(on_disk.refocused, place, pixels)

    def adopt(self, pair: Pair) -> None:
        """Take over the next pair of a sealed run, to write its twins. Raises RunError."""
        raw, refocused = (
            PlaneArray.open(array_dir(self._run, 2 * pair.number + twin), self._shards)
            for twin in (0, 1)
        )
        self._pairs.append(_PairOnDisk(pair, raw, refocused, stale=False, finished=True))

    def shards(self, pair: Pair) -> tuple[int, int] | None:
        """Planes of a shard of this pair along t and z; None where a plane is a file."""
        grid = self._pairs[pair.number].raw.grid
        return (grid.t, grid.z) if grid else None

    def trim(self) -> None:
        """Cut all shapes to what is there, and drop shards made ahead. Raises OSError."""
        self._drain()
        for on_disk in self._pairs:
            extent = on_disk.pair.extent
            on_disk.raw.trim(*extent)
            on_disk.refocused.trim(*extent)

    def finish(self) -> None:
        """Cut all shapes to what is there and write the final metadata. Raises OSError."""
        self.trim()
        for on_disk in self._pairs:
            on_disk.z_step_um = on_disk.pair.z_step_um
            self._save_groups(on_disk)
        if self._pairs:
            self._save_lists()

    def close(self) -> None:
        """End the lane and close all files."""
        self._lane.close()
        self._shards.close()

    def _unlist_levels(self, image: Path) -> None:
        if levels.unlist(image):
            self._on_change(image / "zarr.json")
            self._on_change(image)

    def _put(self, array: PlaneArray, place: Place, pixels: Pixels) -> Put:
        staged = array.stage(pixels)
        done = self._lane.submit(array.write, place.t, place.c, place.z, staged)
        grid = array.grid
        if grid is not None and grid.slot(place.t, place.z) == grid.slots // 2:
            self._lane.submit(array.prepare_next, place.t, place.c, place.z)
        unlist = partial(self._lane.submit, array.unlist, place.t, place.c, place.z)
        return Put(staged.pixels, done, unlist)

    def _drain(self) -> None:
        self._lane.submit(lambda: None).result()

    def _save(self, path: Path, content: bytes) -> None:
        disk.replace_file(path, content)
        self._on_change(path)
        self._on_change(path.parent)

    def _add(self, pair: Pair, header: FrameHeader, plane: Pixels) -> None:
        self._drain()
        stack_planes = self._stack_planes or (GUESSED_STACK if "z" in header.axes else 1)
        raw, refocused = (
            PlaneArray.create(
                array_dir(self._run, 2 * pair.number + twin),
                pair.form.shape,
                pair.form.dtype,
                self._shards,
                stack_planes=stack_planes,
            )
            for twin in (0, 1)
        )
        for image in (2 * pair.number, 2 * pair.number + 1):
            self._on_change(array_dir(self._run, image))
        self._on_change(self._run)
        on_disk = _PairOnDisk(pair, raw, refocused)
        self._add_channels(on_disk, header, plane)
        _update_step(on_disk)
        self._save_groups(on_disk)
        self._pairs.append(on_disk)
        try:
            self._save_lists()
            if pair.number == 0:
                self._save(self._run / "zarr.json", ome.root_group())
        except OSError:
            self._pairs.pop()
            raise
        on_disk.stale = False

    def _add_channels(self, on_disk: _PairOnDisk, header: FrameHeader, plane: Pixels) -> None:
        names = on_disk.pair.channel_names[len(on_disk.channels) :]
        for array in (on_disk.raw, on_disk.refocused):
            array.cover(0, len(on_disk.channels) + len(names) - 1, 0)
        on_disk.channels += tuple(ome.channel(name, plane, header.bit_depth) for name in names)
        on_disk.stale = True

    def _save_groups(self, on_disk: _PairOnDisk) -> None:
        images = on_disk.images()
        for image in images:
            self._save(image_dir(self._run, image.number) / "zarr.json", ome.image_group(image))
        on_disk.xml = ome.xml_image(images[0]), ome.xml_image(images[1])

    def _save_lists(self) -> None:
        folder = self._run / "OME"
        disk.make_folders(folder)
        self._save(folder / "zarr.json", ome.series_group(2 * len(self._pairs)))
        elements = [element for on_disk in self._pairs for element in on_disk.xml]
        self._save(folder / "METADATA.ome.xml", ome.xml(elements))


def _update_step(on_disk: _PairOnDisk) -> None:
    """Take over the pair's z step where it is new, or changed by more than the stage's jitter.

    It takes a look at all heights: at every new one of a few, then whenever they are an eighth
    more. `finish` does so at the end.
    """
    if len(on_disk.pair.z_um) - on_disk.z_known <= on_disk.z_known // 8:
        return
    on_disk.z_known = len(on_disk.pair.z_um)
    old, new = on_disk.z_step_um, on_disk.pair.z_step_um
    if old != new and not (old and new and abs(new - old) < 0.05 * old):
        on_disk.z_step_um = new
        on_disk.stale = True
