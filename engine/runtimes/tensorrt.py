"""TensorRT on an NVIDIA GPU: the runtime for the microscope PC.

`load` gets everything ready for one shape: the plan (from the cache, or built now, which may take
minutes), its proof (engine/gate.py), and two slots (engine/runtimes/slot.py), so that the copies of
one plane hide behind the computing of the other. `start` and its answer only copy into and out of
pinned memory and wait.

Whether a shape fits is decided in `load`, from the memory that is free then. A plane that does not
fit, or is larger than any plan, is cut into tiles with exact halo (engine/tiles.py), the largest
that fit; what cannot be cut, because its network looks at the whole plane, or not small enough, is
REJECTED with the reason. Shapes loaded before make room first.

Everything here belongs to the thread that opened it. After a `GpuError` nothing on this GPU can be
trusted any more: the worker leaves, and is started again.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import product

import numpy as np

from engine.gate import check_golden
from engine.gpu import Gpu, GpuError, GpuMemoryError, open_gpu
from engine.package import Package
from engine.plan import Profile, Toolkit, open_toolkit, profile_for, rtx_capability
from engine.plan_cache import ensure
from engine.runtimes import Answer, Refocused
from engine.runtimes.executable import Executable
from engine.runtimes.slot import DTYPES, Slot
from engine.scaling import Scaling
from engine.tiles import Span, padded_shape, spans
from refocus.errors import EngineError, RejectedError, SettingsError
from refocus.frame import Pixels

SLOTS = 2
MAX_LOADED = 2
"""Shapes kept, the latest used: a camera has one, a region of interest makes another."""
LARGEST_PX = 8192
"""Side of the largest plan."""
CORES_PX = (4096, 2048, 1024, 512)
"""Sides of tiles to try, without their halo."""
LEFT_FREE = 0.1
"""Share of the free memory that is left to others: the screen hangs on the same GPU."""

Window = tuple[int, int]
"""(y, x) px of what is computed at once: the whole plane, or a tile with its halo."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A shape that is ready."""

    shape: tuple[int, int]
    window: Window
    grid: list[tuple[Span, Span]]
    """Tiles, rows and columns of each; none where the plane goes through whole."""
    slots: deque[Slot]
    """The one at the left has rested longest."""

    @property
    def is_tiled(self) -> bool:
        return bool(self.grid)

    def start(self, pixels: Pixels, scaling: Scaling) -> Slot:
        """Begin with a window in the next slot."""
        slot = self.slots[0]
        self.slots.rotate(-1)
        slot.start(pixels, scaling)
        return slot


class TensorRt:
    """The runtime protocol of engine/runtimes on one GPU."""

    def __init__(
        self,
        device: int = 0,
        *,
        open_executable: Callable[..., Executable] = Executable,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Raises SettingsError where there is no TensorRT, no GPU, or none that it knows.

        *say* hears of plans that are built and proven.
        """
        self._toolkit: Toolkit = open_toolkit()
        self._gpu: Gpu = open_gpu(device)
        if self._toolkit.is_rtx:
            try:
                rtx_capability(self._toolkit, self._gpu.device.capability)
            except SettingsError:
                self._gpu.close()
                raise
        self._open_executable = open_executable
        self._say = say
        self._package: Package | None = None
        self._executables: dict[tuple[str, Profile], Executable] = {}
        self._loaded: OrderedDict[tuple[str, tuple[int, int]], _Loaded] = OrderedDict()
        self._flying = 0

    @property
    def name(self) -> str:
        return f"{self._toolkit.name} {self._gpu.device.name} fp16, {self._gpu.seam}"

    @property
    def slots(self) -> int:
        return SLOTS

    def load(self, package: Package, shape: tuple[int, int]) -> None:
        """As in the protocol. Raises RejectedError for a shape that this GPU cannot take."""
        key = (package.hash, shape)
        if key not in self._loaded:
            if self._flying:
                raise EngineError("another shape was loaded while planes are in work")
            while len(self._loaded) >= MAX_LOADED:
                self._drop_oldest()
            self._loaded[key] = self._prepare(package, shape)
        self._loaded.move_to_end(key)
        self._package = package

    def start(self, pixels: Pixels, scaling: Scaling) -> Answer:
        loaded = self._ready_for(pixels)
        if self._flying == SLOTS:
            raise EngineError(f"{SLOTS} planes are in work already; wait for the oldest")
        slot = None if loaded.is_tiled else loaded.start(pixels, scaling)
        self._flying += 1

        def answer() -> Refocused:
            self._flying -= 1
            if slot is None:
                return _refocus_in_tiles(loaded, pixels, scaling)
            return slot.finish()

        return answer

    def refocus(self, pixels: Pixels, scaling: Scaling) -> Refocused:
        made = self.start(pixels, scaling)()
        return Refocused(made.pixels.copy(), made.clipped)

    def bare(self, package: Package, shape: tuple[int, int]) -> Callable[[], None]:
        self.load(package, shape)
        return self._loaded[package.hash, shape].slots[0].run_network

    def close(self) -> None:
        # A GPU that failed fails here again, and whoever it failed knows already.
        with suppress(GpuError), ExitStack() as last:
            last.callback(self._gpu.close)
            for executable in self._executables.values():
                last.callback(executable.close)
            _close_with(last, [slot for loaded in self._loaded.values() for slot in loaded.slots])
            self._executables.clear()
            self._loaded.clear()

    def _ready_for(self, pixels: Pixels) -> _Loaded:
        if pixels.dtype not in DTYPES:
            raise RejectedError(
                f"pixels are {pixels.dtype}; only uint8 and uint16 are refocused "
                "(float frames are kept raw)"
            )
        shape = (pixels.shape[0], pixels.shape[1])
        loaded = self._loaded.get((self._package.hash if self._package else "", shape))
        if loaded is None:
            raise EngineError(f"nothing is loaded for a plane of {shape}; call load first")
        return loaded

    # -- getting ready ---------------------------------------------------------------------------

    def _prepare(self, package: Package, shape: tuple[int, int]) -> _Loaded:
        """Slots for the whole plane, or else for the largest tiles that fit."""
        reason = f"{shape[0]} x {shape[1]} px are more than any plan takes ({LARGEST_PX} px a side)"
        for window, grid in _windows(package, shape):
            try:
                executable = self._executable(package, window)
                slots = self._take_slots(package, executable, window)
                return _Loaded(shape, window, grid, slots)
            except GpuMemoryError as error:
                reason = str(error)
        tiles = "not even in tiles"
        if package.manifest.halo_px is None:
            tiles = f"nor in tiles, because {package.manifest.name} looks at the whole plane"
        raise RejectedError(f"{self._gpu.device.name} cannot refocus the plane, {tiles}: {reason}")

    def _take_slots(self, package: Package, executable: Executable, window: Window) -> deque[Slot]:
        slots: deque[Slot] = deque()
        padded = padded_shape(window, package.manifest.stride)
        with ExitStack() as failing:
            for _ in range(SLOTS):
                slots.append(Slot(self._gpu, executable, window, padded))
                failing.callback(slots[-1].close)
            self._make_room(sum(slot.device_bytes for slot in slots), window)
            for slot in slots:
                slot.take()
            failing.pop_all()
        executable.save_jit()
        return slots

    def _make_room(self, wanted_bytes: int, window: Window) -> None:
        """Raises GpuMemoryError where *wanted_bytes* cannot be had, decided from what is free."""
        while wanted_bytes > (have_bytes := self._free_bytes()):
            if not self._loaded:
                raise GpuMemoryError(
                    f"{window[0]} x {window[1]} px take {wanted_bytes / 2**20:.0f} MiB on the GPU, "
                    f"{have_bytes / 2**20:.0f} MiB are free; close what else uses it"
                )
            self._drop_oldest()

    def _free_bytes(self) -> int:
        return int(self._gpu.memory().free_bytes * (1 - LEFT_FREE))

    def _executable(self, package: Package, window: Window) -> Executable:
        """The plan for *window*, deserialised and proven."""
        profile = profile_for(window, package.manifest.stride)
        key = (package.hash, profile)
        if key not in self._executables:
            plan = ensure(package, self._toolkit, self._gpu.device, profile, say=self._say)
            executable = self._open_executable(self._toolkit, plan.data, plan.jit_cache)
            try:
                self._prove(package, executable)
            except BaseException:
                executable.close()
                raise
            self._executables[key] = executable
        return self._executables[key]

    def _prove(self, package: Package, executable: Executable) -> None:
        """Raises PackageError where the plan's answers are not the package's own."""

        def refocus(pixels: Pixels, scaling: Scaling) -> Pixels:
            shape = (pixels.shape[0], pixels.shape[1])
            padded = padded_shape(shape, package.manifest.stride)
            with closing(Slot(self._gpu, executable, shape, padded)) as slot:
                slot.take()
                slot.start(pixels, scaling)
                return slot.finish().pixels.copy()

        lowest_db = check_golden(package, refocus, self.name)
        self._say(f"accuracy gate: {lowest_db:.1f} dB against the float32 master")

    def _drop_oldest(self) -> None:
        _, loaded = self._loaded.popitem(last=False)
        with ExitStack() as last:
            _close_with(last, loaded.slots)


def _close_with(last: ExitStack, slots: Iterable[Slot]) -> None:
    """Memory is given back when nothing is under way any more, in any of them."""
    for slot in slots:
        last.callback(slot.close)
    for slot in slots:
        last.callback(slot.settle)  # the last come first


def _windows(
    package: Package, shape: tuple[int, int]
) -> Iterator[tuple[Window, list[tuple[Span, Span]]]]:
    """What could be computed at once, the largest first, with the tiles that the plane makes."""
    if max(shape) <= LARGEST_PX:
        yield shape, []
    stride, halo_px = package.manifest.stride, package.manifest.halo_px
    if halo_px is None:
        return
    whole = [_round_up(side, stride) for side in shape]
    for core_px in (_round_up(side, stride) for side in CORES_PX):
        window = tuple(min(core_px + 2 * halo_px, side) for side in whole)
        if window != tuple(whole) and max(window) <= LARGEST_PX:
            rows, columns = (spans(side, core_px, halo_px, stride) for side in shape)
            yield (window[0], window[1]), list(product(rows, columns))


def _refocus_in_tiles(loaded: _Loaded, raw: Pixels, scaling: Scaling) -> Refocused:
    """The whole plane, tile by tile. Clipped pixels in the halo of a neighbour count twice."""
    answer = np.empty_like(raw)
    clipped = 0
    under_way: deque[tuple[Slot, Span, Span]] = deque()

    def keep_oldest() -> int:
        slot, rows, columns = under_way.popleft()
        made = slot.finish()
        kept = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        answer[kept] = made.pixels[_inner(rows), _inner(columns)]
        return made.clipped

    for rows, columns in loaded.grid:
        if len(under_way) == len(loaded.slots):
            clipped += keep_oldest()
        tile = raw[rows.read_start : rows.read_stop, columns.read_start : columns.read_stop]
        # Only where the plane ends off the stride grid: padded as a whole plane would be.
        missing = [(0, wanted - got) for wanted, got in zip(loaded.window, tile.shape, strict=True)]
        tile = np.pad(tile, missing, mode="reflect") if any(map(any, missing)) else tile
        under_way.append((loaded.start(tile, scaling), rows, columns))
    while under_way:
        clipped += keep_oldest()
    return Refocused(answer, clipped)


def _inner(span: Span) -> slice:
    """The part of a tile that is kept, counted from the tile's own beginning."""
    return slice(span.start - span.read_start, span.stop - span.read_start)


def _round_up(side: int, stride: int) -> int:
    return -(-side // stride) * stride
