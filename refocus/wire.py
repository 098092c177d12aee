"""What travels between link and worker over ZeroMQ: [kind, header JSON, pixels], nothing else.

The link (daemon side) binds a ROUTER, a worker connects DEALERs. No pickle anywhere: a header is
JSON of a known struct, pixels are the bare bytes of one plane. Any byte string that is not a valid
message raises `WireError` here; the receiver throws it away and lives on, and the link gives up the
worker that sent it. `encode` refuses what `decode` would refuse.

  worker -> link   HELLO   I am here: epoch, secret, model, how many frames I can hold (credit)
                   BEAT    every 250 ms, from a thread of its own: alive, and the seq in work
                   BUSY    compiling or warming up (or, with no words, done with it): not a hang
                   RESULT  the refocused plane of one seq
                   FAULT   one seq could not be refocused, and why
                   TAKEN   the offered memory is open here, or why it cannot be
                  BYE     leaving in order
  link -> worker   FRAME   one plane with its scaling; only against credit
                  OFFER   memory to share (refocus/arena.py), for a worker that said it would
                   BEAT    the daemon is alive (a worker that hears nothing leaves)
                   RENEW   you were given up: introduce yourself again, under a new epoch
                   BYE     stop

An epoch names one introduction of one worker. Whatever comes under an epoch that the link has given
up (a frozen worker thawed, an answer overtaken by a time-out) is late, and is discarded.

Pixels of FRAME and RESULT are the third part, or lie in the shared memory at `place`: then there is
no third part, and the answer lies where the frame lay.
"""

import enum
from typing import Any, TypeVar

import msgspec
import numpy as np

from refocus.errors import WireError
from refocus.frame import FrameHeader, Pixels

PROTOCOL = 2
SECRET_VARIABLE = "REFOCUS_WIRE_SECRET"
"""Environment variable through which a worker learns the secret of its link."""
MAX_HEADER_BYTES = 16 * 1024
MAX_PIXEL_BYTES = 512 * 1024 * 1024
"""A 16,384² uint16 frame; ZeroMQ drops the peer that sends a longer part."""


class Kind(bytes, enum.Enum):
    """First part of every message."""

    HELLO = b"HELLO"
    BEAT = b"BEAT"
    BUSY = b"BUSY"
    FRAME = b"FRAME"
    RESULT = b"RESULT"
    FAULT = b"FAULT"
    OFFER = b"OFFER"
    TAKEN = b"TAKEN"
    RENEW = b"RENEW"
    BYE = b"BYE"


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    epoch: str


class Hello(_Header, frozen=True, kw_only=True):
    """A worker introduces itself. *credit*: frames it can hold at once (slots + 1)."""

    protocol: int = PROTOCOL
    secret: str
    pid: int
    model: str
    """Hash of the model package in use."""
    runtime: str
    shapes: list[tuple[int, int]] = []
    """Frame shapes (y, x) that are compiled already."""
    shared_memory: bool = False
    """On the same computer: it may be offered memory to share."""
    credit: int

    def __post_init__(self) -> None:
        if not 1 <= self.credit <= 64:
            raise WireError(f"HELLO: credit must be 1..64, got {self.credit}")


class Beat(_Header, frozen=True, kw_only=True):
    """Alive. *seq* is the frame in work, None while idle."""

    seq: int | None = None


class Busy(_Header, frozen=True, kw_only=True):
    """A long step that is no hang, in words ("compiling for 2048 x 2048"); empty: it is over."""

    what: str


class Job(_Header, frozen=True, kw_only=True):
    """Header of FRAME: a plane, and the affine map of its channel (counts)."""

    frame: FrameHeader
    offset: float
    scale: float
    place: int | None = None
    """Slot where the pixels lie; None: they follow."""


class Result(_Header, frozen=True, kw_only=True):
    """Header of RESULT: the refocused plane has the raw plane's shape and dtype."""

    seq: int
    shape: tuple[int, int]
    dtype: str
    clipped: int
    place: int | None = None
    """Slot where the pixels lie, the frame's own; None: they follow."""


class Fault(_Header, frozen=True, kw_only=True):
    """One frame could not be refocused. *rejected*: it was not the generator's to touch."""

    seq: int
    reason: str
    rejected: bool = False


class Offer(_Header, frozen=True, kw_only=True):
    """Memory to share, by the name to open it with; it takes the place of what was offered before.

    Frames have a `place` in it from the moment on when the worker has said TAKEN.
    """

    name: str
    slots: int
    slot_bytes: int


class Taken(_Header, frozen=True, kw_only=True):
    """The memory of this name is open, or *trouble* says why not; then it is not used."""

    name: str
    trouble: str = ""


class Renew(_Header, frozen=True, kw_only=True):
    """The epoch that is no longer valid."""


class Bye(_Header, frozen=True, kw_only=True):
    """Leaving (worker) or stop (link); *refused*: why the link will not have this worker."""

    refused: str = ""


Message = Hello | Beat | Busy | Job | Result | Fault | Offer | Taken | Renew | Bye

_HEADERS: dict[Kind, type[Message]] = {
    Kind.HELLO: Hello,
    Kind.BEAT: Beat,
    Kind.BUSY: Busy,
    Kind.FRAME: Job,
    Kind.RESULT: Result,
    Kind.FAULT: Fault,
    Kind.OFFER: Offer,
    Kind.TAKEN: Taken,
    Kind.RENEW: Renew,
    Kind.BYE: Bye,
}
_KINDS = {header: kind for kind, header in _HEADERS.items()}
_ENCODER = msgspec.json.Encoder()
_DECODERS: dict[Kind, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(header) for kind, header in _HEADERS.items()
}
_DTYPES = {"uint8": np.uint8, "uint16": np.uint16}

T = TypeVar("T")


def encode(message: Message, pixels: Pixels | None = None) -> list[Any]:
    """Parts to hand to ``send_multipart(..., copy=False)``; *pixels* must be C-contiguous.

    Raises WireError where the other side would have to refuse them.
    """
    kind = _KINDS[type(message)]
    try:
        header = _ENCODER.encode(message)
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise WireError(f"{kind.name}: header cannot be sent: {error}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"{kind.name}: header of {len(header)} bytes, at most {MAX_HEADER_BYTES}")
    if pixels is None:
        return [kind.value, header]
    if pixels.nbytes > MAX_PIXEL_BYTES:
        raise WireError(f"{kind.name}: {pixels.nbytes} bytes of pixels, at most {MAX_PIXEL_BYTES}")
    return [kind.value, header, pixels]


def decode(parts: list[Any]) -> tuple[Message, Pixels | None]:
    """A message and its pixels (y, x), read-only, from received parts (zmq.Frame or bytes).

    A HELLO of another protocol is reduced to what it takes to refuse it. Raises WireError on
    anything else: unknown kind, bad or oversized header, pixels that do not match the header to
    the byte, or that came although they have a place.
    """
    if not 2 <= len(parts) <= 3:
        raise WireError(f"a message has 2 or 3 parts, got {len(parts)}")
    kind = _kind(bytes(parts[0]))
    raw = bytes(parts[1])
    if len(raw) > MAX_HEADER_BYTES:
        raise WireError(f"{kind.name}: header of {len(raw)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        message = _foreign_hello(raw) if kind is Kind.HELLO else None
        message = message or _DECODERS[kind].decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{kind.name}: header is not valid: {error}") from error
    if isinstance(message, Job | Result):
        of = message.frame if isinstance(message, Job) else message
        _require_form(kind, of.shape, of.dtype)
        if message.place is None:
            return message, _plane(kind, parts, of.shape, of.dtype)
    if len(parts) != 2:
        raise WireError(f"{kind.name}: carries no pixels, but a third part came")
    return message, None


class _AnyHello(msgspec.Struct):
    """What every protocol's HELLO has; other fields are left aside."""

    epoch: str
    protocol: int
    pid: int


_ANY_HELLO = msgspec.json.Decoder(_AnyHello)


def _foreign_hello(raw: bytes) -> Hello | None:
    hello = _ANY_HELLO.decode(raw)
    if hello.protocol == PROTOCOL:
        return None
    return Hello(
        epoch=hello.epoch,
        protocol=hello.protocol,
        secret="",
        pid=hello.pid,
        model="",
        runtime="",
        credit=1,
    )


def _kind(name: bytes) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        raise WireError(f"unknown message kind {name[:16]!r}") from None


def _require_form(kind: Kind, shape: tuple[int, int], dtype: str) -> None:
    if dtype not in _DTYPES:
        raise WireError(f"{kind.name}: dtype must be uint8 or uint16, got {dtype!r}")
    if min(shape) < 1:
        raise WireError(f"{kind.name}: shape must be positive, got {shape}")


def _plane(kind: Kind, parts: list[Any], shape: tuple[int, int], dtype: str) -> Pixels:
    if len(parts) != 3:
        raise WireError(f"{kind.name}: pixels are missing")
    # A zmq.Frame keeps the received memory alive through its buffer: no copy here.
    buffer = parts[2].buffer if hasattr(parts[2], "buffer") else parts[2]
    wanted = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if len(buffer) != wanted:
        raise WireError(f"{kind.name}: {len(buffer)} bytes of pixels, {shape} {dtype} has {wanted}")
    plane: Pixels = np.frombuffer(buffer, _DTYPES[dtype]).reshape(shape)
    plane.flags.writeable = False
    return plane
