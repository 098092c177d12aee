"""Frames to the workers, answers back: what is sent with a frame, and what an answer means.

One thread, the link's, owns everything here. A frame that was handed out is in its worker's
`working` until it is answered, once; the answer names the generator of the worker that gave it.
"""

import time
from collections.abc import Callable, Mapping

from acquire.admission import Admission
from acquire.intake import Intake
from acquire.items import Answer, Maker, Plane
from acquire.peers import Peer
from engine.scaling import Scaling
from refocus import wire
from refocus.errors import RejectedError, WireError
from refocus.frame import Frame, FrameHeader, Pixels, RefocusOutcome
from refocus.settings import ChannelSettings

Send = Callable[[bytes, wire.Message, Pixels | None], bool]
"""Sends a worker (its identity) a message; False: it cannot be reached."""


class Exchange:
    """Hands out frames of *intake* through *send*, and tells it what became of them.

    *scalings*: those that the run has already, by channel.
    """

    def __init__(
        self,
        intake: Intake,
        channels: Mapping[str, ChannelSettings],
        scalings: Mapping[str, Scaling],
        send: Send,
    ) -> None:
        self._intake = intake
        self._send = send
        self._admission = Admission(channels, scalings, self._note_scaling)
        self.next_seq = 0
        """No frame of this number, or a larger one, was handed out yet."""
        self.latest_shape: tuple[int, int] | None = None
        """Of the latest frame (y, x) that was handed out. Any thread."""

    def hand_out(self, peer: Peer, frame: Frame) -> bool:
        """Gives the worker a frame, or books why not; False: the worker cannot be reached."""
        try:
            return self._hand_out(peer, frame)
        except (RejectedError, WireError) as error:
            peer.shared.drop(frame.header.seq)
            self.answer(frame.header, RefocusOutcome.REJECTED, str(error), peer.maker)
        except BaseException:
            self.answer(frame.header, RefocusOutcome.FAILED, "the link failed on it")
            raise
        return True

    def _hand_out(self, peer: Peer, frame: Frame) -> bool:
        header = frame.header
        self.next_seq = max(self.next_seq, header.seq + 1)
        self.latest_shape = header.shape
        scaling = self._admission.admit(frame, peer.package.manifest)
        epoch = peer.hello.epoch
        if offer := peer.shared.offer(epoch, frame.pixels.nbytes):
            self._send(peer.identity, offer, None)
        place = peer.shared.put(header.seq, frame.pixels)
        job = wire.Job(
            epoch=epoch, frame=header, offset=scaling.offset, scale=scaling.scale, place=place
        )
        if not peer.working:
            peer.progress_ns = time.monotonic_ns()
        if not self._send(peer.identity, job, frame.pixels if place is None else None):
            self.answer(header, RefocusOutcome.SKIPPED, "the worker went away")
            return False
        peer.working[header.seq] = header
        return True

    def result(self, peer: Peer, result: wire.Result, pixels: Pixels | None) -> None:
        """The worker's plane. Raises WireError for a frame, or a place, that it was not given."""
        plane, done = peer.shared.take(result, pixels)
        sent = self._settle(peer, result.seq)
        if (tuple(result.shape), result.dtype) != (sent.shape, sent.dtype):
            done()
            reason = f"the worker answered {result.shape} {result.dtype}"
            wanted = f"wanted {sent.shape} {sent.dtype}"
            self.answer(sent, RefocusOutcome.FAILED, f"{reason}, {wanted}", peer.maker)
            return
        self._intake.answer(
            Answer(
                result.seq,
                RefocusOutcome.REFOCUSED,
                plane=Plane(plane, result.clipped, done),
                maker=peer.maker,
            )
        )

    def fault(self, peer: Peer, fault: wire.Fault) -> None:
        """Why the worker has no plane. Raises WireError for a frame that it was not given."""
        sent = self._settle(peer, fault.seq)
        peer.shared.drop(fault.seq)
        outcome = RefocusOutcome.REJECTED if fault.rejected else RefocusOutcome.FAILED
        self.answer(sent, outcome, fault.reason, peer.maker)

    def lost(self, peer: Peer, reason: str) -> None:
        """The worker will not answer for what it still has."""
        peer.shared.close()
        for header in peer.working.values():
            self.answer(header, RefocusOutcome.LOST, reason)

    def late(self, seq: int) -> None:
        """A frame that was booked LOST was answered after all."""
        reason = "answered after its worker had been given up"
        self._intake.answer(Answer(seq, RefocusOutcome.LATE, reason))

    def skip_waiting(self) -> None:
        """No worker will ever take what waits."""
        while (frame := self._intake.take_newest()) is not None:
            reason = self._intake.no_engine or "the run ended first"
            self.answer(frame.header, RefocusOutcome.SKIPPED, reason)

    def answer(
        self, header: FrameHeader, outcome: RefocusOutcome, reason: str, maker: Maker | None = None
    ) -> None:
        """What became of a frame that has no refocused plane."""
        self._intake.answer(Answer(header.seq, outcome, reason, maker=maker))

    def _settle(self, peer: Peer, seq: int) -> FrameHeader:
        header = peer.working.pop(seq, None)
        if header is None:
            raise WireError(f"an answer for frame {seq}, which this worker was not given")
        peer.busy, peer.progress_ns = "", time.monotonic_ns()
        return header

    def _note_scaling(self, channel: str, chosen: Scaling) -> None:
        self._intake.note(lambda run: run.note_scaling(channel, chosen.offset, chosen.scale))
