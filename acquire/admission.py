"""Which frames the generator may touch, and the one scaling of each channel.

A channel's scaling is derived from its first frame that is not flat, frozen, and noted in the run,
so that whatever refocuses this run later uses the same map bit for bit: it takes the noted ones as
they are, and derives one only for a channel that has none. They outlive the generator: another one
that takes over works with the same. The three planes of a colour exposure share one map, or their
hue would shift.
"""

import logging
from collections.abc import Callable, Mapping

from engine import scaling
from engine.package import Manifest, unfit
from engine.scaling import Scaling
from refocus.errors import RejectedError
from refocus.frame import Frame
from refocus.settings import ChannelSettings

log = logging.getLogger(__name__)

_COLOURS = ("-R", "-G", "-B")


class Admission:
    """Decides frame by frame; *on_scaling(channel, scaling)* hears of each newly frozen map.

    *scalings*: the maps that are frozen already, by channel.
    *channels*: what the settings say of them. A channel of another modality than the generator's
    is rejected; one that the settings do not name is taken to be the generator's own.
    """

    def __init__(
        self,
        channels: Mapping[str, ChannelSettings],
        scalings: Mapping[str, Scaling],
        on_scaling: Callable[[str, Scaling], None],
    ) -> None:
        self._channels = channels
        self._on_scaling = on_scaling
        self._scalings = dict(scalings)
        self._said_unknown = False

    def admit(self, frame: Frame, manifest: Manifest) -> Scaling:
        """Scaling to refocus *frame* with, by the generator of *manifest*.

        Raises RejectedError with the reason why not.
        """
        reason = unfit(manifest, frame.header)
        if reason:
            raise RejectedError(reason)
        if frame.header.pixel_um is None and not self._said_unknown:
            self._said_unknown = True
            lowest, highest = manifest.pixel_um
            log.warning(
                "Micro-Manager does not know the pixel size, so nobody checks that the generator "
                "fits it (%g to %g um); calibrate it in Micro-Manager's pixel size configuration",
                lowest,
                highest,
            )
        channel = frame.header.channel
        modality = self._modality(channel)
        if modality not in (None, manifest.modality):
            raise RejectedError(
                f"[channels.{channel}] modality is {modality}, generator "
                f"{manifest.name!r} is for {manifest.modality}"
            )
        if channel not in self._scalings:
            chosen = self._sibling(channel) or scaling.derive([frame.pixels])
            if chosen is None:
                raise RejectedError("the frame is flat: there is nothing to refocus or to scale by")
            self._scalings[channel] = chosen
            self._on_scaling(channel, chosen)
        return self._scalings[channel]

    def _modality(self, channel: str) -> str | None:
        whole = channel[:-2] if channel.endswith(_COLOURS) else channel
        named = self._channels.get(channel) or self._channels.get(whole)
        return named.modality if named else None

    def _sibling(self, channel: str) -> Scaling | None:
        if not channel.endswith(_COLOURS):
            return None
        known = (self._scalings.get(channel[:-2] + colour) for colour in _COLOURS)
        return next((found for found in known if found is not None), None)
