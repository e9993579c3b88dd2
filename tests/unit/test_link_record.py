"""Frames are found in a stream however it is cut, and what was seen of them comes back from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.channel.record import DOWN, UP, Frame, Framing, LinkRecord, Route, read_record
from testbed.errors import RunLogError

ROUTE = Route(device=3, direction=UP, connection=5)
GREETING = b"\xff" + bytes(63)


def frame_bytes(flags: int, size: int) -> bytes:
    """A frame on the wire; large ones say so."""
    head = bytes([flags | 2]) + size.to_bytes(8, "big") if size > 255 else bytes([flags, size])
    return head + bytes(size)


def follow(framing: Framing, chunks: list[bytes]) -> tuple[list[Frame], list[int]]:
    """The frames that ended, and where in the stream."""
    frames, ends, at = [], [], 0
    for now_ns, chunk in enumerate(chunks):
        stretches = framing.split(chunk, now_ns, prompt=1)
        assert sum(size for size, _, _ in stretches) == len(chunk)
        for size, frame, ends_here in stretches:
            at += size
            if ends_here:
                assert frame is not None
                frames.append(frame)
                ends.append(at)
    return frames, ends


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    chunks = []
    while stream:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(stream[:size])
        stream = stream[size:]
    return chunks


FRAMES = st.lists(st.tuples(st.sampled_from([0, 1, 4]), st.sampled_from([0, 1, 5, 255, 256, 3000])), max_size=12)


@given(FRAMES, st.lists(st.integers(1, 900), min_size=1, max_size=10))
def test_frames_are_found_however_the_stream_is_cut(frames: list[tuple[int, int]], sizes: list[int]) -> None:
    sent = [GREETING, *(frame_bytes(flags, size) for flags, size in frames)]
    found, ends = follow(Framing(ROUTE), cut(b"".join(sent), sizes))
    assert [frame.size_bytes for frame in found] == [len(content) for content in sent]
    assert [frame.flags for frame in found] == [content[0] for content in sent]
    assert ends == [sum(map(len, sent[: count + 1])) for count in range(len(sent))]


def test_a_frame_knows_when_its_first_and_its_last_byte_came() -> None:
    (greeting, frame), _ = follow(Framing(ROUTE), [GREETING[:10], GREETING[10:] + b"\x00", b"\x03ab", b"c"])
    assert (greeting.first_in_ns, greeting.last_in_ns) == (0, 1)
    assert (frame.first_in_ns, frame.last_in_ns) == (1, 3)
    assert (frame.route, frame.prompt) == (ROUTE, 1)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1", GREETING + b"\x08", GREETING + b"\x00\x00\xff"])
def test_what_is_no_zmtp_is_given_up_for_good(noise: bytes) -> None:
    framing = Framing(ROUTE)
    follow(framing, [noise])
    assert framing.lost
    assert framing.split(frame_bytes(0, 9), 9, 1) == [(11, None, False)]


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=20))
def test_no_stream_whatsoever_breaks_it(chunks: list[bytes]) -> None:
    follow(Framing(ROUTE), chunks)
    follow(Framing(ROUTE), [GREETING, *chunks])


def delivered(size_bytes: int) -> Frame:
    frame = Frame(ROUTE, 1000, 2, 4)
    frame.size_bytes, frame.last_in_ns, frame.air_begin_ns, frame.air_ns = size_bytes, 1001, 1001.6, 250.25
    return frame


def test_the_record_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    record = LinkRecord(["near", "far"])
    record.add(delivered(7), air_end_ns=1300.4, due_ns=1400.0, out_ns=1500)
    record.write(tmp_path / "links.parquet")
    table = read_record(tmp_path / "links.parquet")
    assert table.to_pylist() == [
        {
            "device": 3,
            "direction": UP,
            "prompt": 2,
            "connection": 5,
            "flags": 4,
            "bytes": 7,
            "first_in_ns": 1000,
            "last_in_ns": 1001,
            "air_begin_ns": 1002,
            "air_end_ns": 1300,
            "due_ns": 1400,
            "out_ns": 1500,
            "air_ns": 250.25,
        }
    ]
    assert json.loads(table.schema.metadata[b"devices"]) == ["near", "far"]
    assert DOWN != UP


def test_the_record_grows_beyond_what_was_set_aside(tmp_path: Path) -> None:
    record = LinkRecord(["near"])
    for size_bytes in range(10_000):
        record.add(delivered(size_bytes), 1.0, 2.0, 3)
    record.write(tmp_path / "links.parquet")
    assert read_record(tmp_path / "links.parquet")["bytes"].to_pylist() == list(range(10_000))


def test_a_record_that_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"noise")
    for name in ("noise", "absent"):
        with pytest.raises(RunLogError, match=rf"{name}: not a readable Parquet file"):
            read_record(tmp_path / name)
    with pytest.raises(RunLogError, match="cannot be written"):
        LinkRecord(["near"]).write(tmp_path / "no folder" / "links.parquet")
