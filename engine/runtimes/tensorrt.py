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
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress

from engine.gate import check_golden
from engine.gpu import Gpu, GpuError, GpuMemoryError, open_gpu
from engine.package import Package, read_golden
from engine.plan import (
    LARGEST_SQUARE_PX,
    PlanMemoryError,
    Profile,
    Toolkit,
    open_toolkit,
    profile_for,
    rtx_capability,
)
from engine.plan_cache import ensure
from engine.runtimes import Answer, Refocused
from engine.runtimes.executable import Executable
from engine.runtimes.loaded import Loaded, Window, refocus_in_tiles, windows
from engine.runtimes.slot import DTYPES, Slot
from engine.scaling import Scaling
from engine.tiles import padded_shape
from refocus.errors import EngineError, RejectedError, SettingsError
from refocus.frame import Pixels

SLOTS = 2
MAX_LOADED = 2
"""Shapes kept, the latest used: a camera has one, a region of interest makes another."""
LEFT_FREE = 0.1
"""Share of the free memory that is left to others: the screen hangs on the same GPU."""


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
        self._gpu: Gpu = open_gpu(device)
        try:
            self._toolkit: Toolkit = open_toolkit()
            if self._toolkit.is_rtx:
                rtx_capability(self._toolkit, self._gpu.device.capability)
        except SettingsError:
            self._gpu.close()
            raise
        self._open_executable = open_executable
        self._say = say
        self._package: Package | None = None
        self._executables: dict[tuple[str, Profile], Executable] = {}
        self._loaded: OrderedDict[tuple[str, tuple[int, int]], Loaded] = OrderedDict()
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
            self._loaded[key] = self._prepare(package, shape)
        self._loaded.move_to_end(key)
        while len(self._loaded) > MAX_LOADED:
            self._drop_oldest()
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
                return refocus_in_tiles(loaded, pixels, scaling)
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

    def _ready_for(self, pixels: Pixels) -> Loaded:
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

    def _prepare(self, package: Package, shape: tuple[int, int]) -> Loaded:
        """Slots for the whole plane, or else for the largest tiles that fit."""
        most_px = LARGEST_SQUARE_PX
        reason = f"{shape[0]} x {shape[1]} px are more than any plan takes ({most_px} px a side)"
        for window, grid in windows(package, shape):
            try:
                executable = self._executable(package, window)
                return Loaded(shape, window, grid, self._slots(package, executable, window))
            except (GpuMemoryError, PlanMemoryError) as error:
                reason = str(error)
        tiles = "not even in tiles"
        if package.manifest.halo_px is None:
            tiles = f"nor in tiles, because {package.manifest.name} looks at the whole plane"
        raise RejectedError(f"{self._gpu.device.name} cannot refocus the plane, {tiles}: {reason}")

    def _slots(self, package: Package, executable: Executable, window: Window) -> deque[Slot]:
        slots: deque[Slot] = deque()
        padded = padded_shape(window, package.manifest.stride)
        with ExitStack() as failing:
            for _ in range(SLOTS):
                slots.append(Slot(self._gpu, executable, window, padded))
                failing.callback(slots[-1].close)
            self._make_room(sum(slot.device_bytes for slot in slots), window)
            for slot in slots:
                slot.allocate()
            failing.pop_all()
        if not all(slot.is_captured for slot in slots):
            self._say("this GPU's work cannot be captured as a graph: it runs step by step, slower")
        try:
            executable.save_jit()
        except OSError as error:
            self._say(f"what TensorRT compiled cannot be kept, every start will do so: {error}")
        return slots

    def _make_room(self, wanted_bytes: int, window: Window) -> None:
        """Raises GpuMemoryError where *wanted_bytes* cannot be had, decided from what is free."""
        slots = [slot for loaded in self._loaded.values() for slot in loaded.slots]
        could_be_bytes = self._free_bytes() + sum(slot.device_bytes for slot in slots)
        while wanted_bytes > (have_bytes := self._free_bytes()):
            if wanted_bytes > could_be_bytes or not self._loaded:
                raise GpuMemoryError(
                    f"{window[0]} x {window[1]} px take {wanted_bytes / 2**20:.0f} MiB on the GPU, "
                    f"{have_bytes / 2**20:.0f} MiB are free; close what else uses it"
                )
            self._drop_oldest()

    def _free_bytes(self) -> int:
        return int(self._gpu.memory().free_bytes * (1 - LEFT_FREE))

    def _executable(self, package: Package, window: Window) -> Executable:
        """The plan for *window*, deserialised and proven."""
        shapes = [window, *(golden.pixels.shape for golden in read_golden(package))]
        height, width = (max(shape[k] for shape in shapes) for k in (0, 1))
        profile = profile_for((height, width), package.manifest.stride)
        key = (package.hash, profile)
        if key not in self._executables:
            executable = self._open(package, profile)
            try:
                self._prove(package, executable)
            except BaseException:
                executable.close()
                raise
            self._executables[key] = executable
        return self._executables[key]

    def _open(self, package: Package, profile: Profile) -> Executable:
        """A plan that TensorRT does not take, although its seal is right, is built anew, once."""
        plan = ensure(package, self._toolkit, self._gpu.device, profile, say=self._say)
        try:
            return self._open_executable(self._toolkit, plan.data, plan.jit_cache)
        except GpuError:
            raise
        except EngineError as error:
            if plan.built_s:
                raise
            self._say(f"the plan is built anew: {error}")
            plan.path.unlink(missing_ok=True)
            plan.jit_cache.unlink(missing_ok=True)
        plan = ensure(package, self._toolkit, self._gpu.device, profile, say=self._say)
        return self._open_executable(self._toolkit, plan.data, plan.jit_cache)

    def _prove(self, package: Package, executable: Executable) -> None:
        """Raises PackageError where the plan's answers are not the package's own."""

        def refocus(pixels: Pixels, scaling: Scaling) -> Pixels:
            shape = (pixels.shape[0], pixels.shape[1])
            padded = padded_shape(shape, package.manifest.stride)
            with closing(Slot(self._gpu, executable, shape, padded)) as slot:
                self._make_room(slot.device_bytes, shape)
                slot.allocate()
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
