"""The engine's end of the wire: python -m engine.worker --address ADDRESS --model FOLDER.

One thread owns the runtime and everything on the GPU: it takes a frame, refocuses it, checks it,
answers, and only then looks for the next. A second thread does nothing but the heartbeat, on a
socket of its own, so that a long computation is no silence and a stopped process is.

The worker may be killed at any time: it holds nothing that anyone needs. It leaves by itself when
the recorder that started it is gone (--supervised) or when it hears no heartbeat for a while
(the daemon, perhaps on another host, is gone). It runs below normal priority: a frame on its way
to the disk matters more than a frame that waits here.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import zmq

from engine import checks, package
from engine.runtimes import Runtime, open_runtime
from engine.scaling import Scaling
from refocus import wire
from refocus.errors import RefocusError, RejectedError, SettingsError, WireError
from refocus.frame import Pixels

CREDIT = 2
"""Frames held at once: one in work, and the next one here already when it is done."""
DEAF_BEATS = 40
"""After so many heartbeats of the link that did not come, the worker leaves."""
SEND_TIMEOUT_MS = 5000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker until it is told to stop. Exit code 0, or 2 when it cannot start."""
    arguments = _arguments(argv)
    _step_back()
    if arguments.supervised:
        _leave_with_parent()
    try:
        loaded = package.load(arguments.model)
        runtime = open_runtime(arguments.runtime, arguments.threads or None)
        if arguments.warm:
            runtime.load(loaded, arguments.warm)
    except RefocusError as error:
        print(f"worker: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    context = zmq.Context()
    try:
        _Worker(context, arguments, loaded, runtime).run()
    except RefocusError as error:
        print(f"worker: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except zmq.Again:
        print(f"worker: nobody listens at {arguments.address}", file=sys.stderr, flush=True)
        return SettingsError.exit_code
    finally:
        runtime.close()
        context.destroy(linger=0)
    return 0


class _Worker:
    """The work loop; the heartbeat's thread shares `_epoch`, `_seq` and `_renew` with it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        arguments: argparse.Namespace,
        loaded: package.Package,
        runtime: Runtime,
    ) -> None:
        self._context = context
        self._address: str = arguments.address
        self._beat_ms: int = arguments.beat_ms
        self._shape: tuple[int, int] | None = arguments.warm
        self._secret = os.environ.get(wire.SECRET_VARIABLE, "")
        self._package = loaded
        self._runtime = runtime
        self._epoch = ""
        self._seq: int | None = None
        self._renew = threading.Event()
        self._stopped = threading.Event()
        self._socket = _dealer(context, self._address)

    def run(self) -> None:
        """Works until BYE."""
        self._introduce()
        heart = threading.Thread(target=self._beat, name="refocus-beat", daemon=True)
        heart.start()
        try:
            while self._serve():
                pass
        finally:
            self._stopped.set()
            heart.join()

    def _introduce(self) -> None:
        self._renew.clear()
        self._epoch = uuid.uuid4().hex
        hello = wire.Hello(
            epoch=self._epoch,
            secret=self._secret,
            pid=os.getpid(),
            model=self._package.hash,
            runtime=self._runtime.name,
            shapes=[self._shape] if self._shape else [],
            credit=CREDIT,
        )
        self._socket.send_multipart(wire.encode(hello))

    def _serve(self) -> bool:
        """One message, or one quiet moment. False: told to stop."""
        if not self._socket.poll(self._beat_ms):
            if self._renew.is_set():
                self._introduce()
            return True
        try:
            message, pixels = wire.decode(self._socket.recv_multipart(copy=False))
        except WireError as error:
            print(f"worker: a message was thrown away: {error}", file=sys.stderr, flush=True)
            return True
        match message:
            case wire.Bye(refused=why) if why:
                raise SettingsError(f"the link refused this worker: {why}")
            case wire.Bye():
                return False
            case wire.Job() if pixels is not None and message.epoch == self._epoch:
                self._work(message, pixels)
        return True

    def _work(self, job: wire.Job, pixels: Pixels) -> None:
        self._seq = seq = job.frame.seq
        try:
            if pixels.shape != self._shape:
                what = f"compiling for {pixels.shape[0]} x {pixels.shape[1]}"
                self._send(wire.Busy(epoch=self._epoch, what=what))
                self._runtime.load(self._package, pixels.shape)
                self._send(wire.Busy(epoch=self._epoch, what=""))
                self._shape = pixels.shape
            made = self._runtime.refocus(pixels, Scaling(job.offset, job.scale))
            checks.check_plane(pixels, made.pixels)
        except RejectedError as error:
            self._send(wire.Fault(epoch=self._epoch, seq=seq, reason=str(error), rejected=True))
        except Exception as error:  # noqa: BLE001 - any failure is this frame's, the next may work
            self._send(wire.Fault(epoch=self._epoch, seq=seq, reason=str(error) or repr(error)))
        else:
            result = wire.Result(
                epoch=self._epoch,
                seq=seq,
                shape=made.pixels.shape,
                dtype=str(made.pixels.dtype),
                clipped=made.clipped,
            )
            self._send(result, made.pixels)
        self._seq = None

    def _send(self, message: wire.Message, pixels: Pixels | None = None) -> None:
        self._socket.send_multipart(wire.encode(message, pixels), copy=False)

    def _beat(self) -> None:
        heard = time.monotonic()
        with contextlib.closing(_dealer(self._context, self._address)) as socket:
            while not self._stopped.is_set():
                with contextlib.suppress(zmq.Again):
                    beat = wire.Beat(epoch=self._epoch, seq=self._seq)
                    socket.send_multipart(wire.encode(beat), zmq.DONTWAIT)
                if socket.poll(self._beat_ms):
                    heard = time.monotonic()
                    parts = socket.recv_multipart()
                    with contextlib.suppress(WireError):
                        message, _ = wire.decode(parts)
                        if isinstance(message, wire.Renew) and message.epoch == self._epoch:
                            self._renew.set()
                    self._stopped.wait(self._beat_ms / 1000)
                elif time.monotonic() - heard > DEAF_BEATS * self._beat_ms / 1000:
                    os._exit(0)  # the work thread may be deep in a computation: no orderly way out


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.SNDHWM, 4),
        (zmq.RCVHWM, 66),
        (zmq.IMMEDIATE, 1),
        (zmq.SNDTIMEO, SEND_TIMEOUT_MS),
        (zmq.MAXMSGSIZE, wire.MAX_PIXEL_BYTES),
    ):
        socket.setsockopt(option, value)
    socket.connect(address)
    return socket


def _step_back() -> None:
    """Below normal priority, for this process alone."""
    with contextlib.suppress(psutil.AccessDenied, OSError):
        nice = 10  # of POSIX; Windows has priority classes instead
        psutil.Process().nice(getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", nice))


def _leave_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if our work thread hangs."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1024):  # empty when the pipe closes
            pass
        os._exit(0)

    threading.Thread(target=watch, name="refocus-parent", daemon=True).start()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def shape(text: str) -> tuple[int, int]:
        y, x = (int(side) for side in text.split("x"))
        return y, x

    parser = argparse.ArgumentParser(prog="python -m engine.worker", description=__doc__)
    parser.add_argument("--address", required=True, help="where the link listens")
    parser.add_argument("--model", required=True, type=Path, help="folder of the model package")
    parser.add_argument("--runtime", default="auto", help="auto, openvino or tensorrt")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores but one")
    parser.add_argument("--beat-ms", type=int, default=250, help="heartbeat interval")
    parser.add_argument("--warm", type=shape, help="frame shape YxX to compile before starting")
    parser.add_argument(
        "--supervised", action="store_true", help="end with the parent, or when input is closed"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
