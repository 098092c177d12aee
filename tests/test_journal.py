"""The journal: what goes in comes out, and nothing that was damaged passes as sound."""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_runs import file_size_limit, start

from refocus.errors import RunError
from refocus.frame import RawOutcome, RefocusOutcome
from store.journal import AppendFile
from store.plain import plain
from store.records import (
    RECORD_BYTES,
    Kind,
    Record,
    crc32c,
    encode,
    file_header,
    read_records,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
RECORDS = st.builds(
    Record,
    seq=st.integers(0, 2**53),
    wall_ns=U64,
    latency_ns=U64,
    image=U32,
    t=U32,
    c=U32,
    z=U32,
    plane_crc32c=U32,
    clipped=U32,
    generator=U32,
    reason=U32,
    kind=st.sampled_from(Kind),
    outcome=st.sampled_from(RefocusOutcome),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "outcomes.bin"


def content(records: list[Record]) -> bytes:
    return file_header() + b"".join(encode(r, number) for number, r in enumerate(records))


def three() -> list[Record]:
    return [
        Record(0, 10, image=0, plane_crc32c=7, outcome=RawOutcome.SAVED),
        Record(0, 11, 5, 1, plane_crc32c=8, generator=1, kind=Kind.REFOCUS, outcome=1),
        Record(1, 12, reason=1, outcome=RawOutcome.FAILED),
    ]


@given(records=st.lists(RECORDS, max_size=5))
def test_records_come_back(file: Path, records: list[Record]) -> None:
    file.write_bytes(content(records))
    found = read_records(file)
    assert (found.records, found.damaged, found.torn_bytes) == (records, [], 0)


def test_the_bytes_are_those_of_the_page_on_the_disk_format() -> None:
    record = Record(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, Kind.REFOCUS, RefocusOutcome.LOST)
    assert encode(record, 0)[:60].hex(" ", 4) == (
        "01000000 00000000 02000000 00000000 03000000 00000000 04000000 05000000 "
        "06000000 07000000 08000000 09000000 0a000000 0b000000 02040000"
    )
    assert file_header()[:24] == b"refocus journal\n" + bytes([1, 0, 0, 0, 64, 0, 0, 0])
    # Checksums that another implementation of crc32c must find, too: its standard check value.
    assert crc32c(b"123456789") == 0xE3069283
    assert encode(record, 0)[60:] == crc32c(bytes(8) + encode(record, 0)[:60]).to_bytes(4, "little")


def test_a_tail_torn_at_any_byte_is_left_out_and_said(file: Path) -> None:
    whole = content(three())
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        found = read_records(file)
        assert found.records == three()[: max(0, length // RECORD_BYTES - 1)]
        assert found.torn_bytes == length % RECORD_BYTES
        assert not found.damaged


@given(records=st.lists(RECORDS, min_size=1, max_size=4), data=st.data())
def test_a_flipped_bit_in_a_record_is_found(
    file: Path, records: list[Record], data: st.DataObject
) -> None:
    whole = bytearray(content(records))
    bit = data.draw(st.integers(0, len(records) * RECORD_BYTES * 8 - 1))
    whole[RECORD_BYTES + bit // 8] ^= 1 << bit % 8
    file.write_bytes(whole)
    found = read_records(file)
    damaged = bit // 8 // RECORD_BYTES
    assert found.damaged == [damaged]
    assert found.records == records[:damaged] + records[damaged + 1 :]


def test_a_flipped_bit_in_the_file_header_is_refused(file: Path) -> None:
    for bit in range(RECORD_BYTES * 8):
        whole = bytearray(content(three()))
        whole[bit // 8] ^= 1 << bit % 8
        file.write_bytes(whole)
        with pytest.raises(RunError, match=r"outcomes\.bin"):
            read_records(file)


def test_a_record_at_another_place_is_damaged(file: Path) -> None:
    first, second, third = three()
    swapped = file_header() + encode(second, 1) + encode(first, 0) + encode(third, 2)
    file.write_bytes(swapped)
    assert read_records(file).damaged == [0, 1]


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = AppendFile(path)
    file.append(b"whole\n")
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        file.append(b"x" * 200)
    assert path.read_bytes() == b"whole\n"
    file.append(b"next\n")
    file.close()
    assert path.read_bytes() == b"whole\nnext\n"


class Stubborn:
    """An object that JSON knows nothing of."""

    def __str__(self) -> str:
        return "a\nb\ud800"


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())  # lone surrogates among them
    | st.binary()
    | st.builds(Stubborn)
    | st.sampled_from([np.float32("nan"), np.int64(3), np.arange(3), np.array([math.inf])]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=ANYTHING)
def test_any_tag_fits_in_one_line_of_json(value: object) -> None:
    line = msgspec.json.encode(plain({"tag": value}))
    assert b"\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_what_json_can_hold_is_kept_as_it_is() -> None:
    value = {"a": [1, -2.5, "µ", None, True], "b": {"c": 2**64 - 1}}
    assert plain(value) == value
    assert plain({1: (np.uint16(7), np.float64("inf"), 2**64)}) == {
        "1": [7, "inf", "18446744073709551616"]
    }


def test_counts_follow_the_last_record(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.book_raw_failed(0, "camera gone")
    run.book_refocus(0, RefocusOutcome.LOST, "worker died")
    run.book_refocus(0, RefocusOutcome.LATE, "answered after all")
    counts = run.close(complete=False, expected_frames=None)
    assert (counts.failed, counts.lost, counts.late, counts.unanswered) == (1, 0, 1, 0)
