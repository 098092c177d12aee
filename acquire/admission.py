"""Which frames the generator may touch, and the one scaling of each channel.

A channel's scaling is derived from its first frame that is not flat, frozen, and noted in the run,
so that whatever refocuses this run later uses the same map bit for bit. The three planes of a
colour exposure share one map, or their hue would shift.
"""

from collections.abc import Callable

from engine import scaling
from engine.package import Manifest, unfit
from engine.scaling import Scaling
from refocus.errors import RejectedError
from refocus.frame import Frame

_COLOURS = ("-R", "-G", "-B")


class Admission:
    """Decides frame by frame; *on_scaling(channel, scaling)* hears of each newly frozen map."""

    def __init__(self, manifest: Manifest, on_scaling: Callable[[str, Scaling], None]) -> None:
        self._manifest = manifest
        self._on_scaling = on_scaling
        self._scalings: dict[str, Scaling] = {}

    def admit(self, frame: Frame) -> Scaling:
        """Scaling to refocus *frame* with. Raises RejectedError with the reason why not."""
        reason = unfit(self._manifest, frame.header)
        if reason:
            raise RejectedError(reason)
        channel = frame.header.channel
        if channel not in self._scalings:
            chosen = self._sibling(channel) or scaling.derive([frame.pixels])
            if chosen is None:
                raise RejectedError("the frame is flat: there is nothing to refocus or to scale by")
            self._scalings[channel] = chosen
            self._on_scaling(channel, chosen)
        return self._scalings[channel]

    def _sibling(self, channel: str) -> Scaling | None:
        if not channel.endswith(_COLOURS):
            return None
        known = (self._scalings.get(channel[:-2] + colour) for colour in _COLOURS)
        return next((found for found in known if found is not None), None)
