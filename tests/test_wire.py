"""Any bytes become a message or a WireError: nothing else, and no crash."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refocus import wire
from refocus.errors import WireError
from refocus.frame import FrameHeader

AXES = st.dictionaries(st.text(max_size=8), st.integers(-99, 99) | st.text(max_size=8), max_size=5)
MAYBE = st.none() | st.floats(-1e6, 1e6)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    return FrameHeader(
        run="r1",
        seq=draw(st.integers(0, 2**53 - 1)),
        axes=draw(AXES),
        camera=draw(st.text(max_size=20)),
        channel=draw(st.text(max_size=20)),
        shape=(draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        dtype=draw(st.sampled_from(["uint8", "uint16"])),
        pixel_um=draw(st.none() | st.floats(1e-3, 100)),
        exposure_ms=draw(MAYBE),
        z_um=draw(MAYBE),
        image_number=draw(st.none() | st.integers(0, 2**40)),
        hook_time_ns=draw(st.integers(0, 2**60)),
    )


def job(header: FrameHeader) -> tuple[wire.Job, np.ndarray]:
    pixels = np.arange(header.shape[0] * header.shape[1]).reshape(header.shape)
    return wire.Job(epoch="e", frame=header, offset=100.5, scale=3.25), pixels.astype(header.dtype)


@given(headers())
def test_a_frame_survives_the_wire_unchanged(header: FrameHeader) -> None:
    message, pixels = job(header)
    parts = [bytes(part) for part in wire.encode(message, pixels)]
    got, plane = wire.decode(parts)
    assert got == message
    assert plane is not None
    assert plane.dtype == pixels.dtype
    assert np.array_equal(plane, pixels)
    assert not plane.flags.writeable


@pytest.mark.parametrize(
    "message",
    [
        wire.Hello(epoch="e", secret="s", pid=1, model="m", runtime="r", credit=2),
        wire.Beat(epoch="e", seq=None),
        wire.Busy(epoch="e", what="compiling"),
        wire.Fault(epoch="e", seq=3, reason="no", rejected=True),
        wire.Offer(epoch="e", name="refocus-arena-1", slots=11, slot_bytes=4096),
        wire.Taken(epoch="e", name="refocus-arena-1", trouble="no such file"),
        wire.Result(epoch="e", seq=3, shape=(2, 3), dtype="uint8", clipped=1, place=7),
        wire.Renew(epoch="e"),
        wire.Bye(epoch="e"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_without_pixels_survives(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)) == (message, None)


@given(headers(), st.integers(0, 63))
def test_a_frame_with_a_place_has_no_third_part(header: FrameHeader, place: int) -> None:
    message = msgspec.structs.replace(job(header)[0], place=place)
    parts = wire.encode(message)
    assert wire.decode(parts) == (message, None)
    with pytest.raises(WireError):
        wire.decode([*parts, job(header)[1].tobytes()])


def test_a_hello_of_another_protocol_can_be_refused() -> None:
    for protocol in (1, wire.PROTOCOL + 1):
        fields = {"epoch": "e", "protocol": protocol, "pid": 7, "model": [1], "surprise": None}
        hello, _ = wire.decode([b"HELLO", msgspec.json.encode(fields)])
        assert isinstance(hello, wire.Hello)
        assert (hello.epoch, hello.protocol, hello.pid) == ("e", protocol, 7)
        assert hello.secret == ""
        assert not hello.shared_memory


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_bytes_are_a_wire_error(parts: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(parts)


def mutations(count: int) -> None:
    """Valid messages with bytes changed, cut or repeated: a message or a WireError."""

    @given(headers(), st.data())
    def mutate(header: FrameHeader, data: st.DataObject) -> None:
        parts = [bytes(part) for part in wire.encode(*job(header))]
        which = data.draw(st.integers(0, 2))
        raw = bytearray(parts[which])
        position = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "repeat"])):
            case "flip":
                raw[position] ^= data.draw(st.integers(1, 255))
            case "cut":
                del raw[position:]
            case "repeat":
                raw[position:position] = raw[position : position + 5]
        parts[which] = bytes(raw)
        try:
            message, _ = wire.decode(parts)
        except WireError:
            return
        assert isinstance(message, wire.Message)

    from hypothesis import settings

    settings(max_examples=count, deadline=None)(mutate)()


def test_mutated_messages_never_crash() -> None:
    mutations(300)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_mutated_messages_never_crash_many() -> None:
    mutations(200_000)


def header_json(**changes: object) -> bytes:
    fields = msgspec.to_builtins(job(HEADER)[0])
    fields["frame"].update(changes)
    return msgspec.json.encode(fields)


HEADER = FrameHeader(run="r", seq=1, axes={"time": 0}, shape=(2, 3), dtype="uint16")


@pytest.mark.parametrize(
    "parts",
    [
        [b"FRAME", header_json(shape=[10**9, 10**9]), b"x"],
        [b"FRAME", header_json(shape=[-2, -3]), bytes(12)],
        [b"FRAME", header_json(shape=[2]), bytes(12)],
        [b"FRAME", header_json(seq=True), bytes(12)],
        [b"FRAME", header_json(seq=-1), bytes(12)],
        [b"FRAME", header_json(dtype="object"), bytes(12)],
        [b"FRAME", header_json(pixel_um=0), bytes(12)],
        [b"FRAME", header_json(surprise=1), bytes(12)][:2],
        [b"FRAME", header_json(), bytes(11)],
        [b"FRAME", header_json(), bytes(13)],
        [b"FRAME", header_json()],
        [b"FRAME", header_json().replace(b"100.5", b"NaN"), bytes(12)],
        [b"FRAME", b"[" * 100_000, bytes(12)],
        [b"FRAME", b'"' + b"x" * wire.MAX_HEADER_BYTES + b'"', bytes(12)],
        [b"BEAT", b'{"epoch":"e"}', b"pixels"],
        [b"BEAT", b'{"epoch":"e","surprise":1}'],
        [b"HELLO", b'{"epoch":"e","secret":"","pid":1,"model":"","runtime":"","credit":0}'],
        [b"HELLO", b'{"epoch":"e","protocol":2,"pid":1,"surprise":1}'],
        [b"HELLO", b'{"epoch":"e","pid":1}'],
        [b"RESULT", b'{"epoch":"e","seq":1,"shape":[0,0],"dtype":"uint8"}', b""],
        [b"RESULT", b'{"epoch":"e","seq":1,"shape":[0,0],"dtype":"uint8","clipped":0,"place":1}'],
        [b"RESULT", b'{"epoch":"e","seq":1,"shape":[2,2],"dtype":"float32","clipped":0,"place":1}'],
        [b"RESULT", b'{"epoch":"e","seq":1,"shape":[2,2],"dtype":"uint8","clipped":0,"place":1.5}'],
        [b"OFFER", b'{"epoch":"e","name":"x","slots":1}'],
        [b"TAKEN", b'{"epoch":"e","name":"x"}', b"pixels"],
        [b"NONSENSE", b"{}"],
        [],
    ],
    ids=repr,
)
def test_attacks_are_refused(parts: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(parts)
