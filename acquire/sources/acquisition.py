"""Run a pycromanager acquisition without its traps.

`run` submits events to Micro-Manager's acquisition engine with our hooks and comes back when the
acquisition is over: complete, stopped, or with a `RunError` that says what went wrong. Against
pycromanager 1.0.2 (each was seen, not read):

- An exception in a hook, a device error or a missing preset ends in a normal return with few or no
  frames. Here every hook is wrapped; what it raises is kept, the acquisition is stopped, and the
  frames that arrived are counted against the events.
- Ctrl-C is noticed only after the whole acquisition. Here the wait is short enough to see it, and
  *stop* ends the acquisition within milliseconds.
- Aborting during a long wait for the next time point keeps one core busy until that time point.
  Here an abort also puts the engine's clock back, so that nothing is left to wait for.
- `await_completion` joins threads without a limit. Here a watchdog stops an acquisition that has
  made no progress, and gives up with a `StuckError` on one that does not react: its threads cannot
  be ended from Python, so the process has to leave with `os._exit` after it has closed its files
  (`refocus.cli.main` does). The watchdog looks at Micro-Manager alone: while a hook runs, an
  autofocus or a fluidics step, the acquisition is not silent.
- A key whose value is None, as `multi_d_acquisition_events` makes them, ends the engine's thread.
  Here it counts as not given.
- An `Acquisition` that cannot be constructed leaves a thread that keeps the process alive, so what
  would make it fail is checked before.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from refocus.errors import RunError, SettingsError, StuckError
from refocus.words import install

Event = dict[str, Any]
"""A Micro-Manager acquisition event, as `pycromanager.multi_d_acquisition_events` makes them."""
Hook = Callable[..., Any]
Metadata = dict[str, Any]

POLL_S = 0.02
ABORT_GRACE_S = 5.0
STALL_S = 30.0
"""Without any sign of life beyond what the events ask to wait, an acquisition counts as hung."""


def run(
    events: Sequence[Event],
    hooks: Mapping[str, Hook],
    *,
    stop: threading.Event,
    stall_s: float = STALL_S,
) -> None:
    """Acquire *events* through *hooks* until all frames came or *stop* is set.

    *hooks* are keyword arguments of pycromanager's Acquisition; `image_process_fn` is required,
    because it counts the frames. SIGINT and SIGTERM set *stop* while this runs in the main thread,
    unless the caller handles them already. What Micro-Manager prints goes to stderr. Raises
    `RunError` if a hook raised, the engine failed, frames are missing though nobody stopped, or the
    acquisition hangs; `StuckError` where it did not react to being stopped.
    """
    start = acquisition_class()
    events = [{key: value for key, value in e.items() if value is not None} for e in events]
    check(events)
    watch = _Watch(hooks, patience_s=stall_s + longest_pause_s(events, _own_exposure_ms()))
    with contextlib.redirect_stdout(sys.stderr), signals_set(stop):
        acquisition = start(**watch.hooks)
        engine = acquisition._acq  # gone once the acquisition has ended
        try:
            acquisition.acquire(events)
        except Exception as error:
            _abort(acquisition, engine)  # or its threads stay
            raise RunError(f"Micro-Manager does not take these events: {error}") from error
        acquisition.mark_finished()
        _wait(acquisition, engine, watch, stop)
    watch.error = watch.error or engine.abort_exception_
    if finding := watch.finding():
        raise RunError(f"{finding}; {watch.frames} of {len(events)} frames arrived")
    if watch.frames < len(events) and not stop.is_set():
        raise RunError(
            f"Micro-Manager ended the acquisition after {watch.frames} of {len(events)} frames and "
            "reported nothing; what it wrote to stderr names the device at fault"
        )


def _wait(acquisition: Any, engine: Any, watch: "_Watch", stop: threading.Event) -> None:
    """Until the acquisition has ended; aborts it on *stop* and on a finding of *watch*."""
    waiter = threading.Thread(
        target=watch.await_completion, args=(acquisition,), name="await-acquisition", daemon=True
    )
    waiter.start()
    aborted_s = None
    while waiter.is_alive():
        # Not stop.wait(): a signal handler that sets an event which the main thread waits on can
        # deadlock on the event's own lock.
        waiter.join(POLL_S)
        if aborted_s is None and (stop.is_set() or watch.finding()):
            aborted_s = time.monotonic()
            _abort(acquisition, engine)
        elif aborted_s is not None and time.monotonic() - aborted_s > ABORT_GRACE_S:
            raise StuckError(
                f"{watch.finding() or 'the acquisition was stopped'}, and it did not react to an "
                f"abort within {ABORT_GRACE_S:.0f} s: {watch.whereabouts}. Restart this process"
            )


def acquisition_class() -> Callable[..., Any]:
    """pycromanager's Acquisition; `SettingsError` where it is not installed."""
    try:
        from pycromanager import Acquisition
    except ImportError as error:
        raise SettingsError(
            f"pycromanager cannot be imported ({error}). Install it: "
            f"{install('micromanager')}, or [demo] for the demo"
        ) from error
    found: Callable[..., Any] = Acquisition
    return found


def check(events: Sequence[Event]) -> None:
    """Refuse (`SettingsError`) what would end in silence, or in a thread that never ends."""
    from mmpycorex import Core, is_pymmcore_active

    if not events:
        raise SettingsError("acquisition: there are no events to acquire")
    if not is_pymmcore_active():
        return  # a Java Micro-Manager checks for itself
    core = Core()
    camera = core.get_camera_device()
    if not camera:
        raise SettingsError("acquisition: Micro-Manager's configuration names no camera")
    if core.get_bytes_per_pixel() == 4:
        raise SettingsError(
            f"acquisition: camera {camera!r} delivers 4 bytes per pixel (RGB or 32 bit), which "
            "pycromanager 1.0.2 cannot start with; choose an 8-bit or 16-bit pixel type"
        )
    for group, preset in {tuple(e["config_group"]) for e in events if "config_group" in e}:
        known = core.get_available_configs(group) if core.is_group_defined(group) else ()
        if preset not in known:
            raise SettingsError(
                f"acquisition: configuration group {group!r} has no preset {preset!r}; "
                f"it has {', '.join(known) or 'none'}"
            )


def longest_pause_s(events: Sequence[Event], exposure_ms: float) -> float:
    """The longest time for which *events* themselves ask the engine to wait or to expose.

    *exposure_ms* is the camera's own, for events that bring none. The engine's clock starts at the
    first image: the first event never waits, and the second waits its whole min_start_time.
    """
    longest_s = clock_s = 0.0
    for event in events[1:]:
        start_s = float(event.get("min_start_time", 0.0))
        longest_s = max(longest_s, start_s - clock_s)
        clock_s = max(clock_s, start_s)
    return longest_s + max(float(e.get("exposure", exposure_ms)) for e in events) / 1000


def _own_exposure_ms() -> float:
    from mmpycorex import Core

    return float(Core().get_exposure())


class _Watch:
    """The hooks, wrapped: they count, keep the first error, and never raise into the engine."""

    def __init__(self, hooks: Mapping[str, Hook], patience_s: float) -> None:
        self._patience_s = patience_s
        self.frames = 0
        self.error: BaseException | None = None
        self._at = ""
        self._hang: str | None = None  # kept: the abort that follows may bring it back to life
        self._alive_s = time.monotonic()
        self._inside: list[str] = []  # hooks that run now, each on a thread of Micro-Manager's
        self.hooks: dict[str, Hook] = {
            name: self._guard_image(hook)
            if name == "image_process_fn"
            else self._guard_event(name, hook)
            for name, hook in hooks.items()
        }

    def finding(self) -> str | None:
        """What is wrong with the acquisition, or None."""
        if self.error is not None:
            return f"{self._at or 'Micro-Manager'} failed: {self.error!r}"
        if self._hang is None and not self._inside:
            silent_s = time.monotonic() - self._alive_s
            if silent_s > self._patience_s:
                self._hang = f"the acquisition hangs: no frame and no event for {silent_s:.0f} s"
        return self._hang

    @property
    def whereabouts(self) -> str:
        """Where an acquisition that does not end is stuck."""
        if self._inside:
            return f"{' and '.join(self._inside)} did not return"
        return "Micro-Manager's threads are stuck"

    def await_completion(self, acquisition: Any) -> None:
        try:
            acquisition.await_completion()
        except Exception as error:  # noqa: BLE001  the engine raises anything; `finding` reports it
            self.error = self.error or error

    def _guard_image(self, hook: Hook) -> Hook:
        # pycromanager counts the parameters of this function: two, or it does not call it.
        def image_process_fn(image: Any, metadata: Metadata) -> Any:
            self.frames += 1
            try:
                with self._running("image_process_fn"):
                    return hook(image, metadata)
            except Exception as error:  # noqa: BLE001  raising here would lose the error's type
                self._keep("image_process_fn", error)
                return None

        return image_process_fn

    def _guard_event(self, name: str, hook: Hook) -> Hook:
        def event_hook(event: Any) -> Any:
            try:
                with self._running(name):
                    return hook(event)
            except Exception as error:  # noqa: BLE001  raising here ends "normally" with 0 frames
                self._keep(name, error)
                return event

        return event_hook

    @contextlib.contextmanager
    def _running(self, name: str) -> Iterator[None]:
        self._inside.append(name)
        try:
            yield
        finally:
            self._alive_s = time.monotonic()  # before the silence can be looked at
            self._inside.remove(name)

    def _keep(self, name: str, error: Exception) -> None:
        if self.error is None:
            self._at = name
            self.error = error


def _abort(acquisition: Any, engine: Any) -> None:
    engine.abort()
    # The engine spins, ignoring the abort, until the next event's start time: start of the
    # acquisition + min_start_time. A start at the epoch puts every event into the past.
    engine.set_start_time_ms(0)
    acquisition.mark_finished()


@contextlib.contextmanager
def signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set *stop* while inside, where nobody else handles them."""
    ours = {}
    if threading.current_thread() is threading.main_thread():
        for number, default in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
        ):
            if signal.getsignal(number) is default:
                ours[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield
    finally:
        for number, before in ours.items():
            signal.signal(number, before)
