"""The engine's end of the wire: python -m engine.worker --address ADDRESS --model FOLDER.

One thread owns the runtime and everything on the GPU: it takes a frame and has the runtime start on
it, as many at once as that has slots, and otherwise waits for the oldest, checks it and answers:
answers go in the order of the starts. How they travel, and the heartbeat, is engine/uplink.py.

The worker may be killed at any time: it holds nothing that anyone needs. It leaves by itself when
the recorder that started it is gone (--supervised) or when it hears no heartbeat for a while
(the daemon, perhaps on another host, is gone), and where it compiles for longer than --ready-ms
(it hangs, and whoever could kill it may be on another host). After a `GpuError` nothing on its GPU
can be trusted any more: it says so for every plane in work and leaves with code 1, to be started
again. With code 2 it leaves where its generator cannot run here, and is not started again. It runs
below normal priority: a frame on its way to the disk matters more than a frame that waits here.
"""

import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import zmq

from engine import checks, package
from engine.gpu import GpuError, GpuMemoryError
from engine.manners import Patience, leave_with_parent, say, step_back
from engine.runtimes import Answer, Runtime, choose
from engine.scaling import Scaling
from engine.uplink import Uplink
from refocus import keys, wire
from refocus.errors import (
    PackageError,
    RefocusError,
    RefusedError,
    RejectedError,
    WireError,
)
from refocus.frame import Pixels

MOST_REASON = 2000
"""Characters of a FAULT's reason: a compiler's whole log does not fit through the wire."""


def main(
    argv: Sequence[str] | None = None,
    open_runtime: Callable[[argparse.Namespace], Runtime] | None = None,
) -> int:
    """Runs a worker until it is told to stop; *open_runtime* takes the place of `choose`.

    Exit code 0, 1 where the GPU failed, 2 when it cannot start, 5 where no link has it now.
    """
    given = _arguments(argv)
    patience = Patience(given.ready_ms / 1000)
    patience.begin()
    step_back()
    if given.supervised:
        leave_with_parent()
    try:
        loaded = package.load(given.model)
        runtime = (open_runtime or _open_runtime)(given)
        try:
            _work(given, loaded, runtime, patience)
        except GpuError as error:
            say(str(error))
            os._exit(error.exit_code)  # to release anything of a broken GPU context may hang
        finally:
            runtime.close()
    except RefocusError as error:
        say(str(error))
        return error.exit_code
    finally:
        patience.end()
    return 0


def _open_runtime(given: argparse.Namespace) -> Runtime:
    chosen = choose(given.runtime, given.threads or None, given.device, say)
    say(f"{chosen.runtime.name}: {chosen.why}")
    return chosen.runtime


def _work(
    given: argparse.Namespace, loaded: package.Package, runtime: Runtime, patience: Patience
) -> None:
    context = zmq.Context()
    key = keys.read_worker(given.keys) if given.keys else None
    uplink = Uplink(context, given.address, given.beat_ms, key)
    try:
        _Worker(uplink, given.beat_ms, loaded, runtime, patience).run(given.warm)
    except zmq.Again as error:
        raise RefusedError(f"nobody listens at {given.address}") from error
    finally:
        uplink.close()
        context.term()


class _InWork(NamedTuple):
    """A plane that the runtime has started on."""

    job: wire.Job
    raw: Pixels
    answer: Answer


class _Worker:
    """The work loop."""

    def __init__(
        self,
        uplink: Uplink,
        beat_ms: int,
        loaded: package.Package,
        runtime: Runtime,
        patience: Patience,
    ) -> None:
        self._uplink = uplink
        self._quiet_ms = beat_ms
        self._package = loaded
        self._runtime = runtime
        self._patience = patience
        self._shape: tuple[int, int] | None = None
        self._in_work: deque[_InWork] = deque()

    def run(self, warm: tuple[int, int] | None) -> None:
        """Works until BYE; *warm*: a shape to get ready for before HELLO."""
        if warm:
            with contextlib.suppress(RejectedError):  # every plane of this shape will hear why
                self._runtime.load(self._package, warm)
                self._shape = warm
        self._introduce()
        self._patience.end()
        try:
            while self._serve():
                pass
        except (GpuError, PackageError) as error:
            self._leave(error)
            raise

    def _introduce(self) -> None:
        runtime = self._runtime
        self._uplink.introduce(self._package.hash, runtime.name, runtime.slots, self._shape)

    def _serve(self) -> bool:
        """One message, one plane answered, or one quiet moment. False: told to stop."""
        may_start = len(self._in_work) < self._runtime.slots
        if not (may_start and self._uplink.poll(0 if self._in_work else self._quiet_ms)):
            if self._in_work:
                self._finish_oldest()
            elif self._uplink.must_renew:
                self._introduce()
            return True
        try:
            message, pixels = self._uplink.receive()
        except WireError as error:
            say(f"a message was thrown away: {error}")
            return True
        match message:
            case wire.Bye(refused=why) if why:
                manifest = self._package.manifest
                raise RefusedError(
                    f"the recorder refused this worker ({manifest.name} {manifest.version}): {why}"
                )
            case wire.Bye():
                return False
            case wire.Job() if message.epoch == self._uplink.epoch:
                self._start(message, pixels)
            case wire.Offer() if message.epoch == self._uplink.epoch:
                self._finish_all()
                self._uplink.take(message)
        return True

    def _start(self, job: wire.Job, pixels: Pixels | None) -> None:
        try:
            raw = self._uplink.raw(job, pixels)
            if raw.shape != self._shape:
                self._finish_all()
                self._uplink.seq = job.frame.seq
                self._prepare(raw.shape)
            answer = self._runtime.start(raw, Scaling(job.offset, job.scale))
        except Exception as error:  # noqa: BLE001 - any failure is this frame's, the next may work
            self._fail(job, error)
        else:
            self._in_work.append(_InWork(job, raw, answer))
        self._note_oldest()

    def _prepare(self, shape: tuple[int, int]) -> None:
        epoch = self._uplink.epoch
        self._shape = None
        self._uplink.send(wire.Busy(epoch=epoch, what=f"compiling for {shape[0]} x {shape[1]}"))
        self._patience.begin()
        try:
            self._runtime.load(self._package, shape)
        finally:
            self._patience.end()
            self._uplink.send(wire.Busy(epoch=epoch, what=""))
        self._shape = shape

    def _finish_all(self) -> None:
        while self._in_work:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        job, raw, answer = self._in_work.popleft()
        try:
            made = answer()
            checks.check_plane(raw, made.pixels)
        except Exception as error:  # noqa: BLE001 - any failure is this frame's, the next may work
            self._fail(job, error)
        else:
            self._uplink.answer(job, made)
        self._note_oldest()

    def _note_oldest(self) -> None:
        self._uplink.seq = self._in_work[0].job.frame.seq if self._in_work else None

    def _fail(self, job: wire.Job, error: Exception) -> None:
        """Say that a frame failed; raises *error* where every other one would, too.

        That is where the GPU is not to be trusted any more, and where the generator cannot run
        here or did not pass the accuracy gate.
        """
        rejected = isinstance(error, RejectedError)
        self._fault(job, str(error) or repr(error), rejected=rejected)
        gpu_broke = isinstance(error, GpuError) and not isinstance(error, GpuMemoryError)
        if gpu_broke or isinstance(error, PackageError):
            raise error

    def _leave(self, error: RefocusError) -> None:
        """The last words: what is in work is lost."""
        with contextlib.suppress(zmq.Again):
            while self._in_work:
                self._fault(self._in_work.popleft().job, str(error))
            self._uplink.say_goodbye()

    def _fault(self, job: wire.Job, reason: str, *, rejected: bool = False) -> None:
        seq, reason = job.frame.seq, reason[:MOST_REASON]
        self._uplink.send(wire.Fault(epoch=job.epoch, seq=seq, reason=reason, rejected=rejected))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def shape(text: str) -> tuple[int, int]:
        y, x = (int(side) for side in text.split("x"))
        return y, x

    parser = argparse.ArgumentParser(prog="python -m engine.worker", description=__doc__)
    parser.add_argument("--address", required=True, help="where the link listens")
    parser.add_argument("--keys", type=Path, help="key file, for a link on another host")
    parser.add_argument("--model", required=True, type=Path, help="folder of the model package")
    parser.add_argument("--runtime", default="auto", help="auto, openvino or tensorrt")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores but one")
    parser.add_argument("--device", type=int, default=0, help="which GPU, by its number")
    parser.add_argument("--beat-ms", type=int, default=250, help="heartbeat interval")
    parser.add_argument("--ready-ms", type=int, default=0, help="compile so long; 0: for ever")
    parser.add_argument("--warm", type=shape, help="frame shape YxX to compile before starting")
    parser.add_argument(
        "--supervised", action="store_true", help="end with the parent, or when input is closed"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
