"""The daemon's end of the wire: frames to the workers against credit, outcomes back.

One thread owns the ROUTER socket and everything here. It takes the newest waiting frame when a
worker has credit for it, so a refocused plane is as fresh as the engine allows, and it answers for
every frame it took exactly once:

  REJECTED   the generator must not touch it, or it is flat (`acquire.admission`)
  REFOCUSED  the worker's plane
  FAILED     the worker's FAULT
  LOST       the worker went silent (beats missed), hung (frame_timeout_ms), or left
  LATE       after LOST only, and superseding it: the answer came after all, under an old epoch

A worker that goes silent or hangs is given up at once: its epoch is retired, its process killed by
the supervisor, and whatever it still says is late. Nothing here can delay the hook or the writer.
"""

import contextlib
import hmac
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping

import zmq

from acquire.admission import Admission
from acquire.intake import Intake
from acquire.items import Answer, Maker, Plane
from acquire.peers import GivenUp, Limits, Peer
from engine.package import Package
from engine.scaling import Scaling
from refocus import wire
from refocus.errors import EngineError, RejectedError, WireError
from refocus.frame import Frame, FrameHeader, Pixels, RefocusOutcome
from refocus.settings import Settings

log = logging.getLogger(__name__)

MAX_PLANES_WAITING = 8
"""Refocused planes that may wait for the disk; with more the engine pauses, frames are skipped."""
MOST_MESSAGES = 64
"""Messages handled in a row before the link looks at anything else."""


class Link:
    """Serves any number of workers that connect to *address* with *secret* and *package*'s hash.

    *scalings*: those that the run has already, by channel.
    Called from the link's thread: *on_ready(pid)* for a worker that has introduced itself,
    *on_gone(pid, reason)* for one that was given up, *on_trouble(line)* if the link itself fails,
    which ends refocusing for this run. Raises EngineError where *address* cannot be opened.
    """

    def __init__(
        self,
        intake: Intake,
        settings: Settings,
        package: Package,
        scalings: Mapping[str, Scaling],
        *,
        address: str,
        secret: str,
        on_ready: Callable[[int], None],
        on_gone: Callable[[int, str], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._intake = intake
        self._package = package
        self._secret = secret
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._on_trouble = on_trouble
        self._beat_ns = settings.link.beat_ms * 1_000_000
        self._limits = Limits(
            silence=self._beat_ns * settings.link.beats_missed,
            frame=settings.engine.frame_timeout_ms * 1_000_000,
            warmup=settings.engine.warmup_timeout_ms * 1_000_000,
        )
        self._peers: dict[str, Peer] = {}
        self._given_up = GivenUp()
        self.runtime = ""
        """What the latest worker runs the generator with."""
        self._admission = Admission(
            package.manifest, settings.channels, scalings, self._note_scaling
        )
        self._last_beat_ns = 0
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._context = zmq.Context()
        try:
            self._router = _open_router(self._context, address)
        except EngineError:
            self._context.destroy(linger=0)
            raise
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where the link really listens (a free port has been chosen by now)."""
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        intake.ring = self._wake
        self._thread = threading.Thread(target=self._run, name="refocus-link")
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Any thread. True once a worker has introduced itself."""
        return self._ready.wait(timeout_s)

    @property
    def workers(self) -> int:
        """Workers that are alive now."""
        return len(self._peers)

    def close(self) -> None:
        """After `Intake.end`. Workers are told to stop, frames they still have are booked LOST."""
        self._stopping.set()
        self._thread.join()
        self._router.close(0)
        self._context.term()
        self._bell.close()
        self._ring.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the link is awake anyway; or closed
            self._ring.send(b"!")

    # -- the link's thread from here on ----------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                self._turn(poller)
        except Exception as error:  # noqa: BLE001 - frames must have their outcome all the same
            reason = f"the link to the engine failed: {error!r}"
            self._intake.no_engine = reason
            self._on_trouble(f"{reason}; recording goes on without refocusing")
        finally:
            for peer in list(self._peers.values()):
                self._send(peer.identity, wire.Bye(epoch=peer.hello.epoch))
                self._retire(peer, "unanswered when the run ended")
            while not self._stopping.wait(0.02) or self._intake.slot_waiting:
                self._skip_waiting()

    def _skip_waiting(self) -> None:
        while (frame := self._intake.take_newest()) is not None:
            reason = self._intake.no_engine or "the run ended first"
            self._answer(frame.header, RefocusOutcome.SKIPPED, reason)

    def _turn(self, poller: zmq.Poller) -> None:
        ready = dict(poller.poll(self._beat_ns // 2_000_000))
        if self._bell.fileno() in ready:
            self._bell.recv(4096)
        self._receive()
        now_ns = time.monotonic_ns()
        self._watch(now_ns)
        if now_ns - self._last_beat_ns >= self._beat_ns:
            self._beat()
            self._last_beat_ns = now_ns
        self._dispatch()

    def _receive(self) -> None:
        for _ in range(MOST_MESSAGES):  # a flood must not keep us from watching the others
            try:
                identity, *parts = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            try:
                message, pixels = wire.decode(parts)
                self._handle(identity.bytes, message, pixels)
            except WireError as error:
                log.warning("a message was thrown away: %s", error)
                for peer in list(self._peers.values()):
                    if identity.bytes in (peer.identity, peer.beat_identity):
                        self._give_up(peer, f"malformed message: {error}")

    def _handle(self, identity: bytes, message: wire.Message, pixels: Pixels | None) -> None:
        if isinstance(message, wire.Hello):
            self._introduce(identity, message)
            return
        peer = self._peers.get(message.epoch)
        if peer is None:
            self._late(identity, message)
            return
        now_ns = time.monotonic_ns()
        peer.seen_ns = now_ns
        match message:
            case wire.Beat(seq=seq):
                peer.beat_identity, peer.at = identity, seq
            case wire.Busy(what=what):
                peer.busy, peer.progress_ns = what, now_ns
            case wire.Result():
                self._result(peer, message, pixels)
            case wire.Fault():
                self._fault(peer, message)
            case wire.Bye():
                self._retire(peer, "the worker left")
            case _:
                raise WireError(f"a worker does not send {type(message).__name__}")

    def _introduce(self, identity: bytes, hello: wire.Hello) -> None:
        refusal = ""
        if hello.protocol != wire.PROTOCOL:
            refusal = f"it speaks protocol {hello.protocol}, this daemon {wire.PROTOCOL}"
        elif not hmac.compare_digest(hello.secret.encode(), self._secret.encode()):
            refusal = "it does not know the secret"
        elif hello.model != self._package.hash:
            refusal = f"it runs generator {hello.model[:12]}, wanted {self._package.hash[:12]}"
        elif hello.epoch in self._peers or hello.epoch in self._given_up:
            refusal = "its epoch was used before"
        if refusal:
            log.warning("a worker (pid %d) was refused: %s", hello.pid, refusal)
            self._send(identity, wire.Bye(epoch=hello.epoch, refused=refusal))
            return
        now_ns = time.monotonic_ns()
        manifest = self._package.manifest
        maker = Maker(hello.model, manifest.name, manifest.version, hello.runtime)
        self._peers[hello.epoch] = Peer(hello, maker, identity, seen_ns=now_ns, progress_ns=now_ns)
        self._note("worker_ready", pid=hello.pid, runtime=hello.runtime, shapes=hello.shapes)
        self.runtime = hello.runtime
        self._on_ready(hello.pid)
        self._ready.set()

    def _result(self, peer: Peer, result: wire.Result, pixels: Pixels | None) -> None:
        sent = self._settle(peer, result.seq)
        if pixels is None or (tuple(result.shape), result.dtype) != (sent.shape, sent.dtype):
            reason = f"the worker answered {result.shape} {result.dtype}"
            wanted = f"wanted {sent.shape} {sent.dtype}"
            self._answer(sent, RefocusOutcome.FAILED, f"{reason}, {wanted}", peer.maker)
            return
        plane = Plane(pixels, result.clipped)
        self._intake.answer(
            Answer(result.seq, RefocusOutcome.REFOCUSED, plane=plane, maker=peer.maker)
        )

    def _fault(self, peer: Peer, fault: wire.Fault) -> None:
        sent = self._settle(peer, fault.seq)
        outcome = RefocusOutcome.REJECTED if fault.rejected else RefocusOutcome.FAILED
        self._answer(sent, outcome, fault.reason, peer.maker)

    def _settle(self, peer: Peer, seq: int) -> FrameHeader:
        header = peer.working.pop(seq, None)
        if header is None:
            raise WireError(f"an answer for frame {seq}, which this worker was not given")
        peer.busy, peer.progress_ns = "", time.monotonic_ns()
        return header

    def _late(self, identity: bytes, message: wire.Message) -> None:
        """Something under an epoch that is not (or no longer) known."""
        epoch = message.epoch
        if isinstance(message, wire.Result | wire.Fault):
            if self._given_up.claim(epoch, message.seq):
                reason = "answered after its worker had been given up"
                self._intake.answer(Answer(message.seq, RefocusOutcome.LATE, reason))
            return
        now_ns = time.monotonic_ns()
        is_beat = isinstance(message, wire.Beat)
        if is_beat and self._given_up.should_renew(epoch, now_ns, self._limits):
            self._send(identity, wire.Renew(epoch=epoch))

    def _watch(self, now_ns: int) -> None:
        for peer in list(self._peers.values()):
            if fault := peer.fault(now_ns, self._limits):
                self._give_up(peer, fault)

    def _give_up(self, peer: Peer, reason: str) -> None:
        log.warning("worker (pid %d) given up: %s", peer.hello.pid, reason)
        self._note("worker_gone", pid=peer.hello.pid, reason=reason)
        self._retire(peer, f"its worker was given up: {reason}")
        self._on_gone(peer.hello.pid, reason)

    def _retire(self, peer: Peer, reason: str) -> None:
        del self._peers[peer.hello.epoch]
        if not self._peers:
            self._ready.clear()
        self._given_up.add(peer)
        for header in peer.working.values():
            self._answer(header, RefocusOutcome.LOST, reason)

    def _beat(self) -> None:
        for peer in list(self._peers.values()):
            if peer.beat_identity is not None:
                self._send(peer.beat_identity, wire.Beat(epoch=peer.hello.epoch))

    def _dispatch(self) -> None:
        while self._intake.planes_waiting < MAX_PLANES_WAITING:
            peer = max(self._peers.values(), key=lambda p: p.credit, default=None)
            if peer is None or peer.credit < 1:
                return
            frame = self._intake.take_newest()
            if frame is None:
                return
            try:
                self._hand_out(peer, frame)
            except (RejectedError, WireError) as error:
                self._answer(frame.header, RefocusOutcome.REJECTED, str(error), peer.maker)
            except BaseException:
                self._answer(frame.header, RefocusOutcome.FAILED, "the link failed on it")
                raise

    def _hand_out(self, peer: Peer, frame: Frame) -> None:
        scaling = self._admission.admit(frame)
        epoch, header = peer.hello.epoch, frame.header
        job = wire.Job(epoch=epoch, frame=header, offset=scaling.offset, scale=scaling.scale)
        if not peer.working:
            peer.progress_ns = time.monotonic_ns()
        if self._send(peer.identity, job, frame.pixels):
            peer.working[header.seq] = header
        else:
            self._answer(header, RefocusOutcome.SKIPPED, "the worker went away")
            self._give_up(peer, "unreachable")

    def _note_scaling(self, channel: str, chosen: Scaling) -> None:
        self._intake.note(lambda run: run.note_scaling(channel, chosen.offset, chosen.scale))

    def _answer(
        self, header: FrameHeader, outcome: RefocusOutcome, reason: str, maker: Maker | None = None
    ) -> None:
        self._intake.answer(Answer(header.seq, outcome, reason, maker=maker))

    def _note(self, kind: str, **fields: object) -> None:
        self._intake.note(lambda run: run.note_event(kind, **fields))

    def _send(self, identity: bytes, message: wire.Message, pixels: Pixels | None = None) -> bool:
        try:
            parts = [identity, *wire.encode(message, pixels)]
            self._router.send_multipart(parts, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:  # nobody there, or its queue is full although it has no credit left
            return False
        return True


def _open_router(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    """Raises EngineError where *address* cannot be bound."""
    router = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.ROUTER_MANDATORY, 1),  # a vanished worker is an error here, not a silent drop
        (zmq.SNDHWM, 66),  # the largest credit + 2, so that a legal send never waits
        (zmq.RCVHWM, 66),
        (zmq.IMMEDIATE, 1),
        (zmq.MAXMSGSIZE, wire.MAX_PIXEL_BYTES),
    ):
        router.setsockopt(option, value)
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        raise EngineError(
            f"[link] address {address} cannot be opened ({error}); another daemon may use it: "
            "choose another port, or auto"
        ) from error
    return router
