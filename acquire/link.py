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
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from acquire.admission import Admission
from acquire.intake import Answer, Intake, Maker, Plane
from engine.package import Package
from engine.scaling import Scaling
from refocus import wire
from refocus.errors import RejectedError, WireError
from refocus.frame import FrameHeader, Pixels, RefocusOutcome
from refocus.settings import Settings

log = logging.getLogger(__name__)

MAX_PLANES_WAITING = 8
"""Refocused planes that may wait for the disk; with more the engine pauses, frames are skipped."""
RETIRED_EPOCHS = 16


@dataclass
class _Peer:
    """One introduced worker."""

    hello: wire.Hello
    maker: Maker
    identity: bytes
    seen_ns: int
    progress_ns: int
    beat_identity: bytes | None = None
    busy: str = ""
    working: "OrderedDict[int, FrameHeader]" = field(default_factory=OrderedDict)

    @property
    def credit(self) -> int:
        return self.hello.credit - len(self.working)


class Link:
    """Serves any number of workers that connect to *address* with *secret* and *package*'s hash.

    *on_gone(pid, reason)* is called from the link's thread for a worker that was given up.
    """

    def __init__(
        self,
        intake: Intake,
        settings: Settings,
        package: Package,
        *,
        address: str,
        secret: str,
        on_gone: Callable[[int, str], None],
    ) -> None:
        self._intake = intake
        self._package = package
        self._secret = secret
        self._on_gone = on_gone
        self._beat_ns = settings.link.beat_ms * 1_000_000
        self._silence_ns = self._beat_ns * settings.link.beats_missed
        self._frame_timeout_ns = settings.engine.frame_timeout_ms * 1_000_000
        self._warmup_timeout_ns = settings.engine.warmup_timeout_ms * 1_000_000
        self._peers: dict[str, _Peer] = {}
        self._retired: OrderedDict[str, set[int]] = OrderedDict()
        self._admission = Admission(package.manifest, settings.channels, self._note_scaling)
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),  # a vanished worker is an error here, not a silent drop
            (zmq.SNDHWM, 66),  # the largest credit + 2, so that a legal send never waits
            (zmq.RCVHWM, 66),
            (zmq.IMMEDIATE, 1),
            (zmq.MAXMSGSIZE, wire.MAX_PIXEL_BYTES),
        ):
            self._router.setsockopt(option, value)
        self._router.bind(address)
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
        with contextlib.suppress(BlockingIOError):  # the socket is full: the link is awake anyway
            self._ring.send(b"!")

    # -- the link's thread from here on ----------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        next_beat_ns = 0
        while not self._stopping.is_set():
            ready = dict(poller.poll(self._beat_ns // 2_000_000))
            if self._bell.fileno() in ready:
                self._bell.recv(4096)
            self._receive()
            now_ns = time.monotonic_ns()
            self._watch(now_ns)
            if now_ns >= next_beat_ns:
                self._beat()
                next_beat_ns = now_ns + self._beat_ns
            self._dispatch()
        for peer in list(self._peers.values()):
            self._send(peer.identity, wire.Bye(epoch=peer.hello.epoch))
            self._retire(peer, "unanswered when the run ended")
        while (frame := self._intake.take_newest()) is not None:
            self._answer(frame.header, RefocusOutcome.SKIPPED, "the run ended first")

    def _receive(self) -> None:
        while True:
            try:
                identity, *parts = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            try:
                message, pixels = wire.decode(parts)
                self._handle(identity.bytes, message, pixels)
            except WireError as error:
                log.warning("a message was thrown away: %s", error)

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
            case wire.Beat():
                peer.beat_identity = identity
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
        elif hello.epoch in self._peers or hello.epoch in self._retired:
            refusal = "its epoch was used before"
        if refusal:
            log.warning("a worker (pid %d) was refused: %s", hello.pid, refusal)
            self._send(identity, wire.Bye(epoch=hello.epoch))
            return
        now_ns = time.monotonic_ns()
        manifest = self._package.manifest
        maker = Maker(hello.model, manifest.name, manifest.version, hello.runtime)
        self._peers[hello.epoch] = _Peer(hello, maker, identity, seen_ns=now_ns, progress_ns=now_ns)
        self._note("worker_ready", pid=hello.pid, runtime=hello.runtime)
        self._ready.set()

    def _result(self, peer: _Peer, result: wire.Result, pixels: Pixels | None) -> None:
        sent = self._settle(peer, result.seq)
        if pixels is None or (tuple(result.shape), result.dtype) != (sent.shape, sent.dtype):
            reason = f"the worker answered {result.shape} {result.dtype}"
            wanted = f"wanted {sent.shape} {sent.dtype}"
            self._answer(sent, RefocusOutcome.FAILED, f"{reason}, {wanted}")
            return
        plane = Plane(pixels, result.clipped, peer.maker)
        self._intake.answer(Answer(result.seq, RefocusOutcome.REFOCUSED, plane=plane))

    def _fault(self, peer: _Peer, fault: wire.Fault) -> None:
        sent = self._settle(peer, fault.seq)
        outcome = RefocusOutcome.REJECTED if fault.rejected else RefocusOutcome.FAILED
        self._answer(sent, outcome, fault.reason)

    def _settle(self, peer: _Peer, seq: int) -> FrameHeader:
        header = peer.working.pop(seq, None)
        if header is None:
            raise WireError(f"an answer for frame {seq}, which this worker was not given")
        peer.busy, peer.progress_ns = "", time.monotonic_ns()
        return header

    def _late(self, identity: bytes, message: wire.Message) -> None:
        """Something under an epoch that is not (or no longer) known."""
        lost = self._retired.get(message.epoch, set())
        if isinstance(message, wire.Result | wire.Fault) and message.seq in lost:
            lost.discard(message.seq)
            reason = "answered after its worker had been given up"
            self._intake.answer(Answer(message.seq, RefocusOutcome.LATE, reason))
        elif isinstance(message, wire.Beat):
            self._send(identity, wire.Renew(epoch=message.epoch))

    def _watch(self, now_ns: int) -> None:
        for peer in list(self._peers.values()):
            limit_ns = self._warmup_timeout_ns if peer.busy else self._frame_timeout_ns
            if now_ns - peer.seen_ns > self._silence_ns:
                self._give_up(peer, f"silent for {(now_ns - peer.seen_ns) / 1e9:.1f} s")
            elif peer.working and now_ns - peer.progress_ns > limit_ns:
                doing = f" while {peer.busy}" if peer.busy else ""
                self._give_up(peer, f"hung for {limit_ns / 1e9:g} s{doing}")

    def _give_up(self, peer: _Peer, reason: str) -> None:
        log.warning("worker (pid %d) given up: %s", peer.hello.pid, reason)
        self._note("worker_gone", pid=peer.hello.pid, reason=reason)
        self._retire(peer, f"its worker was given up: {reason}")
        self._on_gone(peer.hello.pid, reason)

    def _retire(self, peer: _Peer, reason: str) -> None:
        epoch = peer.hello.epoch
        del self._peers[epoch]
        if not self._peers:
            self._ready.clear()
        self._retired[epoch] = set(peer.working)
        if len(self._retired) > RETIRED_EPOCHS:
            self._retired.popitem(last=False)
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
            header = frame.header
            try:
                chosen = self._admission.admit(frame)
            except RejectedError as error:
                self._answer(header, RefocusOutcome.REJECTED, str(error))
                continue
            job = wire.Job(
                epoch=peer.hello.epoch, frame=header, offset=chosen.offset, scale=chosen.scale
            )
            if not peer.working:
                peer.progress_ns = time.monotonic_ns()
            if self._send(peer.identity, job, frame.pixels):
                peer.working[header.seq] = header
            else:
                self._answer(header, RefocusOutcome.SKIPPED, "the worker went away")
                self._give_up(peer, "unreachable")

    def _note_scaling(self, channel: str, chosen: Scaling) -> None:
        self._intake.note(lambda run: run.note_scaling(channel, chosen.offset, chosen.scale))

    def _answer(self, header: FrameHeader, outcome: RefocusOutcome, reason: str) -> None:
        self._intake.answer(Answer(header.seq, outcome, reason))

    def _note(self, kind: str, **fields: object) -> None:
        self._intake.note(lambda run: run.note_event(kind, **fields))

    def _send(self, identity: bytes, message: wire.Message, pixels: Pixels | None = None) -> bool:
        try:
            parts = [identity, *wire.encode(message, pixels)]
            self._router.send_multipart(parts, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:  # nobody there, or its queue is full although it has no credit left
            return False
        return True
