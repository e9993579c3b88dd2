"""A segment's header is believed only where it can be true, and what it claims takes no memory before that."""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import RunLogError
from testbed.runlog.segment import Segment, read_segment
from testbed.runlog.segment_header import CHECKED, PREAMBLE

ROW = np.dtype([("round", "<u8"), ("kept", "?", (2,)), ("rtt_ns", "<i8"), ("commit", "<u8")], align=True)
ABOUT = {"schema": 2, "table": "rounds", "devices": ["a", "b"], "lost_bytes": 8, "run_id": "run"}
NESTED = 100_000
LITTLE_BYTES = 2**20

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A segment of four rows."""
    segment = Segment(tmp_path_factory.mktemp("whole") / "rounds-0000.seg", ABOUT, ROW, capacity=4)
    segment.columns["round"][:] = np.arange(4)
    segment.commit(4)
    return segment.path.read_bytes()


def header_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and all that follows it."""
    first_byte = PREAMBLE.unpack_from(whole)[2]
    return json.loads(whole[PREAMBLE.size : first_byte]), whole[first_byte:]


def with_header(header: Any, rest: bytes, first_byte: int | None = None) -> bytes:
    body = json.dumps(header).encode() if not isinstance(header, bytes) else header
    size = PREAMBLE.size + len(body) if first_byte is None else first_byte
    return PREAMBLE.pack(b"WDMOELOG", CHECKED, size, zlib.crc32(body)) + body + rest


def refused(content: bytes, size_bytes: int | None = None) -> str | None:
    """In which line a file is refused, having taken little memory; None where it is read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds-0000.seg"
        path.write_bytes(content)
        if size_bytes is not None:
            os.truncate(path, size_bytes)
        tracemalloc.start()
        try:
            read_segment(path)
        except RunLogError as error:
            return str(error).replace(folder, "")
        finally:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak_bytes < LITTLE_BYTES + 4 * len(content)
    return None


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON document something stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*at, key) for key, _ in inner] + [place for key, each in inner for place in places(each, (*at, key))]


def test_an_unchanged_header_is_read(whole: bytes) -> None:
    assert refused(whole) is None
    assert refused(with_header(*header_of(whole))) is None


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_header_with_anything_in_it_changed_or_left_out_is_read_or_refused_in_one_line(
    whole: bytes, data: st.DataObject
) -> None:
    header, rest = header_of(whole)
    *outer, last = data.draw(st.sampled_from(places(header)))
    holder: Any = header
    for key in outer:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = data.draw(json_values)
    line = refused(with_header(header, rest))
    assert line is None or (line.startswith("/rounds-0000.seg: ") and "\n" not in line), line


@settings(max_examples=200, deadline=None)
@given(keep=st.integers(0, 2**13), flip=st.none() | st.tuples(st.integers(0, 2**13), st.integers(1, 255)))
def test_a_truncated_segment_and_one_with_a_wrong_byte_is_read_or_refused_in_one_line(
    whole: bytes, keep: int, flip: tuple[int, int] | None
) -> None:
    content = bytearray(whole[:keep])
    if flip is not None and flip[0] < len(content):
        content[flip[0]] ^= flip[1]
    line = refused(bytes(content))
    assert (line is None) == (keep >= len(whole) and (flip is None or flip[0] >= PREAMBLE.unpack_from(whole)[2]))
    assert line is None or "\n" not in line


@pytest.mark.parametrize("name", ["rows", "record"])
def test_a_header_without_what_reading_rests_on_is_named(whole: bytes, name: str) -> None:
    header, rest = header_of(whole)
    del header[name]
    assert f"missing required field `{name}`" in str(refused(with_header(header, rest)))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 2**62},
        {"rows": 2**31},
        {"rows": 0},
        {"rows": -1},
        {"rows": True},
        {"rows": "4"},
        {"rows": 4.5},
        {"lost_bytes": 2**60},
        {"devices": 7},
        {"devices": {}},
        {"schema": "2"},
        {"schema": 10**6},
        {"record": {"itemsize": 2**40, "fields": [["commit", "<u8", [], 0]]}},
        {"record": {"itemsize": 40, "fields": [["commit", "<u8", [2**40], 0]]}},
        {"record": {"itemsize": 40, "fields": [["commit", "<u8", [], 0]]}},
        {"record": {"itemsize": 16, "fields": [["a", "|O", [], 0], ["commit", "<u8", [], 8]]}},
        {"record": {"itemsize": 16, "fields": [["a", "<U999999999", [], 0], ["commit", "<u8", [], 8]]}},
        {"record": {"itemsize": 16, "fields": [["a", "<u8", [], 0]]}},
        {"record": {"itemsize": 16, "fields": [["a", "<u8", [], 12], ["commit", "<u8", [], 8]]}},
        {"record": {"itemsize": 16, "fields": [["commit", "<u8", [], 8], ["commit", "<u8", [], 8]]}},
        {"record": {"itemsize": 16, "fields": []}},
        {"record": []},
    ],
)
def test_a_header_that_cannot_be_true_is_refused(whole: bytes, changed: dict[str, Any]) -> None:
    header, rest = header_of(whole)
    assert refused(with_header({**header, **changed}, rest)) is not None


@pytest.mark.parametrize("header", [b"", b"null", b"[" * NESTED, b"9" * 5000, b"\xff\xfe", b"{}"])
def test_what_is_no_header_at_all_is_refused(whole: bytes, header: bytes) -> None:
    assert "header is damaged" in str(refused(with_header(header, header_of(whole)[1])))


def test_the_size_of_a_header_is_checked_before_it_is_read_from_a_file_that_has_it(whole: bytes) -> None:
    header, rest = header_of(whole)
    for first_byte in (0, PREAMBLE.size - 1, 2**31, 2**32 - 1):
        assert "header is damaged" in str(refused(with_header(header, rest, first_byte), 2**33))


@pytest.mark.parametrize(("rows", "size_bytes"), [(2**27, 2**20), (2**31, 2**35)])
def test_a_claim_of_very_many_rows_takes_no_memory_for_them(whole: bytes, rows: int, size_bytes: int) -> None:
    header, rest = header_of(whole)
    header["record"] = {"itemsize": 8, "fields": [["commit", "<u8", [], 0]]}
    assert refused(with_header({**header, "rows": rows}, rest), size_bytes) is not None
