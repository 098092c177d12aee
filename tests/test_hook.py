"""The hook: a complete header from every kind of metadata, and never an exception."""

import time
from typing import Any

import numpy as np
import pytest

from acquire.header import Hardware
from acquire.hook import Hook
from acquire.intake import Intake
from acquire.items import Answer, Arrival, Item, Refused
from refocus.frame import RefocusOutcome

SNAP = {
    "Axes": {"channel": "DAPI", "position": "A", "time": 0, "z": 0},
    "Camera": "Camera",
    "Exposure": 5.0,
    "Height": 3,
    "PixelSize_um": 0.325,
    "PixelType": None,
    "Width": 4,
    "XPosition_um_Intended": 10.0,
    "YPosition_um_Intended": 20.0,
    "ZPosition_um_Intended": -3.0,
}
SEQUENCE = {
    "Axes": {"time": 0, "z": 1},
    "Camera": "Camera",
    "Exposure": 5.0,
    "Height": "3",
    "ImageNumber": "1",
    "PixelSize_um": 0.0,
    "PixelType": "GRAY16",
    "Width": "4",
}
STAGE = Hardware(x_um=1.0, y_um=2.0, z_um=7.5, bit_depth=12, components=1)


def image(dtype: str = "uint16", shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


class Bench:
    """A hook with its intake; `items` is what the writer would get."""

    def __init__(self, queue_bytes: int = 2**20, **options: Any) -> None:
        self.trouble: list[str] = []
        self.intake = Intake(
            "run",
            raw_queue_bytes=queue_bytes,
            raw_stall_ms=1,
            slot_frames=4,
            on_trouble=self.trouble.append,
        )
        self.intake.start()
        self.hook = Hook(self.intake, on_trouble=self.trouble.append, **options)

    @property
    def items(self) -> list[Item]:
        self.intake.end()
        self.intake.close()
        taken = []
        while (item := self.intake.take(lambda: None)) is not None:
            taken.append(item)
            if isinstance(item, Arrival | Refused):
                self.intake.settled(item)
        assert self.intake.waiting_bytes == 0
        return taken


def test_a_snap_brings_its_own_positions() -> None:
    b = Bench(read_hardware=lambda event: STAGE)
    before_ns = time.monotonic_ns()
    assert b.hook.hardware({"axes": SNAP["Axes"]}) == {"axes": SNAP["Axes"]}
    assert b.hook.image(image(), SNAP) is None
    (arrival,) = b.items
    assert isinstance(arrival, Arrival)
    got = arrival.frame.header
    assert got.axes == SNAP["Axes"]
    assert (got.x_um, got.y_um, got.z_um, got.z_source) == (10.0, 20.0, -3.0, "intended")
    assert (got.shape, got.dtype, got.bit_depth) == ((3, 4), "uint16", 12)
    assert (got.channel, got.pixel_um, got.image_number) == ("DAPI", 0.325, None)
    assert before_ns <= got.hook_time_ns <= time.monotonic_ns()
    assert abs(got.wall_time_ns - time.time_ns()) < 60e9
    assert arrival.tags == SNAP
    assert not arrival.frame.pixels.flags.writeable


def test_a_sequence_takes_z_from_the_stage_as_it_stood() -> None:
    b = Bench(read_hardware=lambda event: STAGE)
    b.hook.hardware([{"axes": {"time": 0, "z": z}} for z in range(3)])
    b.hook.image(image(), SEQUENCE)
    b.hook.image(image(), {**SEQUENCE, "Axes": {"time": 9}})
    first, second = (item.frame.header for item in b.items if isinstance(item, Arrival))
    assert (first.z_um, first.z_source, first.image_number) == (7.5, "stage", 1)
    assert first.pixel_um is None, "Micro-Manager's 0 means unknown"
    assert first.channel == "Default"
    assert (second.z_um, second.z_source) == (None, "none"), "no reading was taken for it"
    assert (first.seq, second.seq) == (0, 1)


@pytest.mark.parametrize(("dtype", "sample"), [("uint32", "u1"), ("uint64", "<u2")])
def test_a_colour_exposure_is_three_planes(dtype: str, sample: str) -> None:
    samples = np.arange(3 * 4 * 4).reshape(3, 4, 4).astype(sample)  # B, G, R, A
    packed = samples.view(f"<{dtype[0]}{np.dtype(dtype).itemsize}")[..., 0]
    assert packed.dtype == dtype
    b = Bench(read_hardware=lambda event: Hardware(components=4))
    b.hook.hardware({"axes": SNAP["Axes"]})
    b.hook.image(packed, SNAP)
    frames = [item.frame for item in b.items if isinstance(item, Arrival)]
    assert [frame.header.channel for frame in frames] == ["DAPI-R", "DAPI-G", "DAPI-B"]
    assert [frame.header.axes["channel"] for frame in frames] == ["DAPI-R", "DAPI-G", "DAPI-B"]
    for frame, place in zip(frames, (2, 1, 0), strict=True):
        assert np.array_equal(frame.pixels, samples[..., place])


def test_32_bit_grey_is_the_bits_of_a_float() -> None:
    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    b = Bench(read_hardware=lambda event: Hardware(components=1))
    b.hook.hardware({"axes": SNAP["Axes"]})
    b.hook.image(values.view(np.uint32), SNAP)
    (arrival,) = b.items
    assert isinstance(arrival, Arrival)
    assert arrival.frame.pixels.dtype == np.float32
    assert np.array_equal(arrival.frame.pixels, values)


@pytest.mark.parametrize(
    ("pixels", "metadata"),
    [
        (image("uint32"), SNAP),
        (image("float64"), SNAP),
        (image("uint16", (3, 4, 5)), SNAP),
        (image("uint16", (0, 4)), SNAP),
        (None, SNAP),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_booked_and_nothing_is_raised(pixels: Any, metadata: Any) -> None:
    b = Bench()
    assert b.hook.image(pixels, metadata) is None
    assert b.hook.image(image(), SNAP) is None
    refused, arrival = b.items
    assert isinstance(refused, Refused)
    assert isinstance(arrival, Arrival)
    assert (refused.seq, arrival.frame.header.seq) == (0, 1)
    assert b.intake.received == 2
    assert refused.reason
    assert b.trouble


def test_odd_metadata_become_unknown_not_an_error() -> None:
    odd = {**SNAP, "Exposure": "soon", "PixelSize_um": "nan", "ImageNumber": True, "Camera": None}
    odd["Axes"] = {
        "time": np.int64(3),
        "angle": 0.5,
        "z": 2.0,
        "tile": [0, 1],
        "none": None,
        "channel": "488 \udcb5m",  # a configuration file in Latin-1
    }
    b = Bench()
    b.hook.image(image(), odd)
    (arrival,) = b.items
    assert isinstance(arrival, Arrival)
    got = arrival.frame.header
    assert (got.exposure_ms, got.pixel_um, got.image_number, got.camera) == (None, None, None, "")
    wanted = {"time": 3, "angle": "0.5", "z": 2, "tile": "[0, 1]", "none": "None"}
    assert got.axes == {**wanted, "channel": "488 ?m"}
    assert b.trouble == []


@pytest.mark.parametrize("metadata", [None, 3, {"Axes": None}, {"Axes": 7}, {}])
def test_an_image_without_usable_metadata_is_kept(metadata: Any) -> None:
    b = Bench(read_hardware=lambda event: STAGE)
    b.hook.event({"axes": {"tile": [0, 1]}})
    b.hook.hardware({"axes": {"tile": [0, 1]}})
    b.hook.image(image(), metadata)
    (item,) = b.items
    assert isinstance(item, Arrival)
    assert b.intake.exposures == 1


def test_micromanager_gets_the_very_object_back_where_it_saves_too() -> None:
    b = Bench(micromanager_saves=True)
    pixels = image()
    answer = b.hook.image(pixels, SNAP)
    assert answer is not None
    assert answer[0] is pixels
    assert answer[1] is SNAP
    assert b.hook.image(None, SNAP) == (None, SNAP), "also when we cannot read it"
    assert [type(item) for item in b.items] == [Arrival, Refused]


def test_a_core_that_fails_costs_the_reading_not_the_frame() -> None:
    def broken(event: object) -> Hardware:
        raise RuntimeError("serial port")

    b = Bench(read_hardware=broken)
    event = {"axes": {"time": 0}}
    assert b.hook.hardware(event) is event
    b.hook.image(image(), SNAP)
    assert isinstance(b.items[0], Arrival)
    assert any("serial port" in line for line in b.trouble)


def test_a_full_raw_queue_stops_the_acquisition_loudly() -> None:
    b = Bench(queue_bytes=2 * image().nbytes)
    for _ in range(4):
        b.hook.image(image(), SNAP)
    kinds = [type(item).__name__ for item in b.items]
    assert kinds == ["Arrival", "Arrival", "Refused", "Refused"]
    assert all("does not keep up" in line for line in b.trouble if "half full" not in line)
    assert b.hook.event({"axes": {}}) is None, "Micro-Manager's way to end the remaining events"
    assert b.hook.hardware({"axes": {}}) is None


def test_one_frame_larger_than_the_queue_still_passes() -> None:
    b = Bench(queue_bytes=1)
    b.hook.image(image(), SNAP)
    assert isinstance(b.items[0], Arrival)


def test_a_slot_without_taker_drops_the_oldest() -> None:
    b = Bench()
    for _ in range(7):
        b.hook.image(image(), SNAP)
    skipped = [item for item in b.items if isinstance(item, Answer)]
    newest = b.intake.take_newest()
    assert newest is not None
    assert newest.header.seq == 6
    assert [answer.seq for answer in skipped] == [0, 1, 2]
    assert {answer.outcome for answer in skipped} == {RefocusOutcome.SKIPPED}


def test_events_are_counted_only_where_the_hook_is_in_use() -> None:
    b = Bench()
    assert b.hook.expected.submitted is None
    b.hook.event({"axes": {}})
    b.hook.event({"axes": {}})
    assert b.hook.expected.submitted == 2
    assert b.hook.expected.missing == 2
    assert b.items == []


def test_readings_of_frames_that_never_came_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("acquire.expected.MOST_READINGS", 50)
    b = Bench(read_hardware=lambda event: STAGE)
    for time_index in range(500):
        b.hook.hardware({"axes": {"time": time_index}})
    assert len(b.hook.expected._readings) == 50
    assert b.items == []


def test_the_reader_is_told_what_every_event_of_a_sequence_says() -> None:
    told: list[object] = []

    def read(event: object) -> Hardware:
        told.append(event)
        return STAGE

    b = Bench(read_hardware=read)
    b.hook.hardware([{"axes": {"time": 0}, "z": 1.0}, {"axes": {"time": 1}}])
    assert told == [{"axes": {"time": 0}}]
    b.hook.image(image(), SEQUENCE | {"Axes": {"time": 1}})
    (arrival,) = b.items
    assert isinstance(arrival, Arrival)
    assert arrival.frame.header.z_um == 7.5


def test_two_cameras_hide_no_image_that_is_missing() -> None:
    """One event gives an image of each camera, under the same axes."""
    b = Bench(read_hardware=lambda event: STAGE)
    for index in range(3):
        event = {"axes": {"time": index}}
        b.hook.event(event)
        b.hook.hardware(event)
    for index in (0, 0, 2, 2):
        b.hook.image(image(), {"Axes": {"time": index}})
    assert b.hook.expected.missing == 1
    headers = [item.frame.header for item in b.items if isinstance(item, Arrival)]
    assert [header.z_um for header in headers] == [7.5] * 4


def test_where_micromanager_saves_too_a_slow_disk_stops_nothing() -> None:
    b = Bench(queue_bytes=2 * image().nbytes, micromanager_saves=True)
    for _ in range(4):
        pixels = image()
        answer = b.hook.image(pixels, SNAP)
        assert answer is not None
        assert answer[0] is pixels
        assert pixels.flags.writeable, "the image is still Micro-Manager's"
    event = {"axes": {}}
    assert b.hook.event(event) is event
    assert b.hook.hardware(event) is event
    assert [type(item).__name__ for item in b.items if not isinstance(item, Answer)] == [
        "Arrival",
        "Arrival",
        "Refused",
        "Refused",
    ]
    assert any("only in Micro-Manager's own storage" in line for line in b.trouble)


def test_an_image_after_the_end_is_refused_loudly() -> None:
    b = Bench()
    b.hook.image(image(), SNAP)
    assert len(b.items) == 1
    b.hook.image(image(), SNAP)
    assert b.hook.stopping.is_set()
    assert "after the recorder was closed" in b.trouble[0]
    assert b.intake.exposures == 1


def test_a_slow_disk_is_said_before_it_costs_anything() -> None:
    b = Bench(queue_bytes=10 * image().nbytes)
    for _ in range(8):
        b.hook.image(image(), SNAP)
    assert len([item for item in b.items if isinstance(item, Arrival)]) == 8
    assert set(b.trouble) == {"the raw queue is half full: frames come faster than the disk writes"}
