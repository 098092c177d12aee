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

Which generator's workers are served may change between two frames: the next one goes to the new
generator, and what the old one has in work it still answers for, under its own name.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from acquire.door import Outside, Remote
from acquire.exchange import Exchange
from acquire.intake import Intake
from acquire.own_generator import FILLED_WITH, IN_USE
from acquire.peers import Limits, Peer, Roster, in_words
from acquire.router import Router
from acquire.shared import SharedPixels
from acquire.trouble import Trouble
from engine.package import Package
from engine.scaling import Scaling
from refocus import wire
from refocus.errors import WireError
from refocus.frame import Pixels
from refocus.settings import Settings

log = logging.getLogger(__name__)

MAX_PLANES_WAITING = 8
"""Refocused planes that may wait for the disk; with more the engine pauses, frames are skipped."""
MOST_MESSAGES = 64
"""Messages handled in a row before the link looks at anything else."""
MOST_NOTES = 4096
"""Comings and goings of workers that a run notes: none of them may fill its journal."""
NO_RIGHT = "its key was taken out of the recorder's key set"


class Link:
    """Serves any number of workers that connect to *address* and know *secret*.

    No frame is handed out before a generator is put to `use`. *scalings*: those that the run has
    already, by channel.
    *outside*: where workers on other hosts are let in, if any are. *filling*: the run is recorded
    already, no frame of it is new.
    Called from the link's thread: *on_ready(pid)* for a worker that has introduced itself,
    *on_gone(pid, reason)* for one that was given up (pid 0: it is on another host),
    *on_trouble(line)* if the link itself fails, which ends refocusing for this run. Raises
    EngineError where *address* cannot be opened; where *outside* cannot, that is told as trouble.
    """

    def __init__(
        self,
        intake: Intake,
        settings: Settings,
        scalings: Mapping[str, Scaling],
        *,
        address: str,
        outside: Outside | None,
        secret: str,
        on_ready: Callable[[int], None],
        on_gone: Callable[[int, str], None],
        on_trouble: Callable[[str], None],
        filling: bool = False,
    ) -> None:
        self._intake = intake
        self._filling = filling
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._on_trouble = on_trouble
        self._beat_ns = settings.link.beat_ms * 1_000_000
        self._limits = Limits(
            silence=self._beat_ns * settings.link.beats_missed,
            frame=settings.engine.frame_timeout_ms * 1_000_000,
            warmup=settings.engine.warmup_timeout_ms * 1_000_000,
        )
        self._may_share = settings.link.shared_memory
        self._roster = Roster(secret)
        self.runtime = ""
        """What the latest worker that gets frames runs the generator with."""
        self._last_beat_ns = 0
        self._notes = 0
        self._refusals = Trouble()
        self._wishes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._router = Router(address, outside, on_trouble)
        self.address = self._router.address
        """Where the link really listens."""
        self._exchange = Exchange(intake, settings.channels, scalings, self._router.send)
        intake.ring = self._router.wake
        self._thread = threading.Thread(target=self._run, name="refocus-link")
        self._thread.start()

    # -- any thread ------------------------------------------------------------------------------

    def let_in(self, package: Package) -> None:
        """Workers of *package* may introduce themselves; they get no frame before its `use`."""
        self._wish(lambda: self._roster.let_in(package))

    def turn_away(self, package: Package) -> None:
        """Workers of *package* are not wanted after all."""
        self._wish(lambda: self._roster.turn_away(package))

    def use(self, package: Package) -> None:
        """From the next frame on, workers of *package* get the frames, and no others.

        The run notes which is the first number that none but this generator can have got. Workers
        of the one before answer for what they have, then they are told to leave.
        """
        self._wish(lambda: self._use(package))

    def wait_ready(self, timeout_s: float) -> bool:
        """True once a worker has introduced itself that gets frames."""
        return self._ready.wait(timeout_s)

    @property
    def latest_shape(self) -> tuple[int, int] | None:
        """Of the latest frame (y, x) that a worker was given."""
        return self._exchange.latest_shape

    @property
    def workers(self) -> int:
        """Workers that get frames and are alive now."""
        return len(self._roster.serving)

    def workers_of(self, package: Package) -> int:
        """Workers of *package* that are alive now, whether they get frames or not."""
        return len(self._roster.running(package))

    def close(self) -> None:
        """After `Intake.end`. Workers are told to stop, frames they still have are booked LOST."""
        self._stopping.set()
        self._thread.join()
        self._router.close()

    def _wish(self, wish: Callable[[], None]) -> None:
        self._wishes.put(wish)
        self._router.wake()

    # -- the link's thread from here on ----------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:  # noqa: BLE001 - frames must have their outcome all the same
            reason = f"the link to the engine failed: {error!r}"
            self._intake.no_engine = reason
            self._on_trouble(f"{reason}; recording goes on without refocusing")
        finally:
            for peer in list(self._roster.peers.values()):
                self._dismiss(peer, "unanswered when the run ended")
            while not self._stopping.wait(0.02) or self._intake.slot_waiting:
                self._exchange.skip_waiting()

    def _turn(self) -> None:
        self._router.wait(self._beat_ns // 2_000_000)
        self._receive()
        while not self._wishes.empty():
            self._wishes.get()()
        now_ns = time.monotonic_ns()
        self._watch(now_ns)
        if now_ns - self._last_beat_ns >= self._beat_ns:
            self._beat()
            self._last_beat_ns = now_ns
        self._dispatch()
        for peer in self._roster.done():
            self._dismiss(peer, "its generator is not in use any more")

    def _use(self, package: Package) -> None:
        self._roster.use(package)
        manifest = package.manifest
        fields = {"name": manifest.name, "version": manifest.version, "package_hash": package.hash}
        if self._filling:
            self._note(FILLED_WITH, **fields)
        else:
            self._note(IN_USE, from_seq=self._exchange.next_seq, **fields)
        self._mark_ready()

    def _mark_ready(self) -> None:
        if serving := self._roster.serving:
            self.runtime = serving[-1].hello.runtime
            self._ready.set()
        else:
            self._ready.clear()

    def _receive(self) -> None:
        for _ in range(MOST_MESSAGES):  # a flood must not keep us from watching the others
            received = self._router.receive()
            if received is None:
                return
            identity, parts = received[0].bytes, received[1:]
            try:
                message, pixels = wire.decode(parts)
                if isinstance(message, wire.Hello):
                    self._introduce(identity, message, self._router.remote(received[0]))
                else:
                    self._handle(identity, message, pixels)
            except WireError as error:
                log.warning("a message was thrown away: %s", error)
                for peer in self._roster.at(identity):
                    self._give_up(peer, f"malformed message: {error}")

    def _handle(self, identity: bytes, message: wire.Message, pixels: Pixels | None) -> None:
        peer = self._roster.peers.get(message.epoch)
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
                self._exchange.result(peer, message, pixels)
            case wire.Fault():
                self._exchange.fault(peer, message)
            case wire.Taken():
                peer.shared.taken(message)
            case wire.Bye():
                self._retire(peer, "the worker left")
            case _:
                raise WireError(f"a worker does not send {type(message).__name__}")

    def _introduce(self, identity: bytes, hello: wire.Hello, remote: Remote | None) -> None:
        refusal = self._roster.refusal(hello, remote)
        if not self._router.has_right(remote):
            refusal = NO_RIGHT
        if refusal:
            self._refuse(identity, hello, remote, refusal)
            return
        known = self._roster.at(identity)
        for before in known:
            self._retire(before, "its worker introduced itself again")
        peer = self._roster.enter(hello, identity, remote, time.monotonic_ns())
        if hello.shared_memory and self._may_share and not remote:
            peer.shared = SharedPixels(hello.credit + MAX_PLANES_WAITING)
        if not known:
            self._note_worker("worker_ready", peer, runtime=hello.runtime, shapes=hello.shapes)
        self._on_ready(peer.pid)
        self._mark_ready()

    def _refuse(
        self, identity: bytes, hello: wire.Hello, remote: Remote | None, refusal: str
    ) -> None:
        # Told once: it may try again and again.
        self._refusals.tell(f"worker {in_words(hello, remote)} was refused: {refusal}")
        self._router.send(identity, wire.Bye(epoch=hello.epoch, refused=refusal))

    def _late(self, identity: bytes, message: wire.Message) -> None:
        """Something under an epoch that is not (or no longer) known."""
        epoch = message.epoch
        if isinstance(message, wire.Result | wire.Fault):
            if self._roster.given_up.claim(epoch, message.seq):
                self._exchange.late(message.seq)
            return
        now_ns = time.monotonic_ns()
        is_beat = isinstance(message, wire.Beat)
        if is_beat and self._roster.given_up.should_renew(epoch, now_ns, self._limits):
            self._router.send(identity, wire.Renew(epoch=epoch))

    def _watch(self, now_ns: int) -> None:
        for peer in list(self._roster.peers.values()):
            if reason := peer.why_give_up(now_ns, self._limits):
                self._give_up(peer, reason)
            elif not self._router.has_right(peer.remote):
                self._router.send(peer.identity, wire.Bye(epoch=peer.hello.epoch, refused=NO_RIGHT))
                self._give_up(peer, NO_RIGHT)

    def _give_up(self, peer: Peer, reason: str) -> None:
        log.warning("worker %s given up: %s", peer.words, reason)
        self._note_worker("worker_gone", peer, reason=reason)
        self._retire(peer, f"its worker was given up: {reason}")
        self._on_gone(peer.pid, reason)

    def _dismiss(self, peer: Peer, reason: str) -> None:
        self._router.send(peer.identity, wire.Bye(epoch=peer.hello.epoch))
        self._retire(peer, reason)

    def _retire(self, peer: Peer, reason: str) -> None:
        self._roster.leave(peer)
        self._mark_ready()
        self._exchange.lost(peer, reason)

    def _beat(self) -> None:
        for peer in list(self._roster.peers.values()):
            if peer.beat_identity is not None:
                self._router.send(peer.beat_identity, wire.Beat(epoch=peer.hello.epoch))

    def _dispatch(self) -> None:
        while self._intake.planes_waiting < MAX_PLANES_WAITING:
            peer = self._roster.freest()
            frame = self._intake.take_newest() if peer is not None else None
            if peer is None or frame is None:
                return
            self._roster.given_up.forget(frame.header.seq)
            if not self._exchange.hand_out(peer, frame):
                self._give_up(peer, "unreachable")

    def _note_worker(self, kind: str, peer: Peer, **fields: object) -> None:
        self._notes += 1
        if self._notes <= MOST_NOTES:
            self._note(kind, **peer.who, **fields)

    def _note(self, kind: str, **fields: object) -> None:
        self._intake.note(lambda run: run.note_event(kind, **fields))
