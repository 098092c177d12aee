"""Which frame goes where: every slot once, Micro-Manager's own numbers where they can be kept."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_runs import frame

from store.layout import AxisIndex, Pair, Place, Placer

AXIS_VALUE = st.integers(-5, 5) | st.integers() | st.text(max_size=3)


def indices(values: list[int | str]) -> list[int]:
    axis = AxisIndex()
    return [axis.of(value) for value in values]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 1, 2, 4, 3], [0, 1, 2, 4, 3]),
        ([5, 6], [5, 6]),
        ([-3, -2, -1, 0, 1], [0, 1, 2, 3, 4]),
        ([3, 2, 1, 0], [3, 2, 1, 0]),
        ([0, 1, -1, 2, -2], [0, 1, 2, 3, 4]),  # centre-out: in the order taken
        ([7_000_000, 7_000_001], [0, 1]),
        ([0, 60_000, 120_000], [0, 1, 2]),  # milliseconds are labels, not distances
        (["A1", "B2", "A1"], [0, 1, 0]),
    ],
)
def test_indices_of_axis_values(values: list[int | str], wanted: list[int]) -> None:
    assert indices(values) == wanted


@given(values=st.lists(AXIS_VALUE))
def test_different_values_never_share_an_index(values: list[int | str]) -> None:
    found = dict(zip(values, indices(values), strict=True))
    assert len(set(found.values())) == len(found)
    assert indices(values) == [found[value] for value in values]


def place(placer: Placer, axes: dict[str, Any], **known: Any) -> tuple[Pair, Place]:
    pair, slot = placer.place(frame(0, axes, **known).header)
    pair.take(slot)
    return pair, slot


AXES = st.dictionaries(
    st.sampled_from(["time", "channel", "z", "position", "laser"]),
    st.integers(-2, 2) | st.just("a"),
)


@given(frames=st.lists(st.tuples(AXES, st.sampled_from([(2, 2), (3, 2)])), max_size=30))
def test_no_slot_is_given_twice(frames: list[tuple[dict[str, Any], tuple[int, int]]]) -> None:
    placer = Placer(None)
    slots = [place(placer, axes, shape=shape)[1] for axes, shape in frames]
    assert len(set(slots)) == len(slots)


def test_a_slot_is_free_until_it_is_taken() -> None:
    placer = Placer(None)
    header = frame(0, {"time": 0}).header
    assert placer.place(header) == placer.place(header)


def test_positions_and_unknown_axes_open_pairs_in_order_of_appearance() -> None:
    placer = Placer(None)
    axes = [{"position": "B"}, {"position": 3}, {"position": "B", "laser": "488"}, {"laser": "488"}]
    assert [place(placer, a | {"time": 0})[0].number for a in axes] == [0, 1, 2, 3]
    assert place(placer, {"position": 3, "time": 1})[0].number == 1
    assert [pair.name for pair in placer.pairs] == ["B", "3", "B, laser=488", "laser=488"]


def test_a_repeat_opens_a_segment_and_what_follows_goes_there() -> None:
    placer = Placer(None)
    segments = [place(placer, {"time": t})[0].segment for t in (0, 1, 0, 1, 2)]
    assert segments == [0, 0, 1, 1, 1]


def test_alternating_forms_keep_to_their_segments() -> None:
    placer = Placer(None)
    sizes = [(4, 4), (6, 6), (4, 4), (6, 6)]
    found = [place(placer, {"time": t}, shape=size)[0].segment for t, size in enumerate(sizes)]
    assert found == [0, 1, 0, 1]
    assert place(placer, {"time": 4}, shape=(4, 4), dtype="uint8")[0].segment == 2
    assert place(placer, {"time": 5}, shape=(4, 4), pixel_um=0.5)[0].segment == 3


def test_colours_of_one_exposure_are_channels() -> None:
    placer = Placer(None)
    slots = [
        place(placer, {"channel": "BF", "time": 0}, channel=name)[1]
        for name in ("BF-R", "BF-G", "BF-B")
    ]
    assert [slot.c for slot in slots] == [0, 1, 2]
    assert placer.pairs[0].channel_names == ["BF-R", "BF-G", "BF-B"]


@pytest.mark.parametrize(
    ("z_um", "step"),
    [
        ([10.0, 10.5, 11.0], 0.5),
        ([11.0, 10.5, 10.0], 0.5),
        ([10.0, 10.52, 10.99], 0.495),
        ([10.0, 10.1, 15.0], None),
        ([10.0], None),
        ([None, None], None),
        ([float("nan"), 1.0, 2.0], 1.0),
    ],
)
def test_z_step(z_um: list[float | None], step: float | None) -> None:
    placer = Placer(None)
    for z, height in enumerate(z_um):
        pair, _ = place(placer, {"z": z}, z_um=height)
    assert pair.z_step_um == step
