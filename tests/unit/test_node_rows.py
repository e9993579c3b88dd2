"""A node's own rows: written, killed, read back, bounded, and never a reason to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from jetson_node import rows as rows_module
from jetson_node.rows import NOT_KEPT, RowFiles, Rows, make_room
from testbed.errors import RunLogError
from testbed.runlog.columns import NODE_RECORD
from testbed.runlog.node_rows import DTYPE, FIELDS, MAX_FILE_BYTES, NodeSegment, is_written, read_node_rows
from testbed.runlog.schema import Reply
from testbed.runlog.segment_header import PREAMBLE
from testbed.wire.messages import ReplyPart, RequestPart

RUN, BOOT = 2**62 - 5, 2**61 + 3


def reply_part(number: int, run: int = RUN) -> ReplyPart:
    return ReplyPart(run, number, 0, 0, 2, 16, 64, 64, "int8", 1000, 9000, 10, 20, 300, 4000, 50)


def keep_block(rows: Rows, number: int, run: int = RUN) -> None:
    request = replace(request_part(number), layer=3)
    rows.computed(reply_part(number, run), request, complete_ns=1100, bytes_down=1088, bytes_up=1087)


def request_part(number: int) -> RequestPart:
    return RequestPart(RUN, number, 0, 1, 0, 1, 7, 64, 64, "int8", "int8", [(1, 3), (2, 4)])


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.seg"), key=lambda path: path.name)


def filled(path: Path, count: int = 3) -> Path:
    segment = NodeSegment(path, "jetson-0", BOOT, 0, 8)
    for number in range(count):
        segment.append(*[number] * (len(NODE_RECORD) - 1), Reply.COMPUTED)
    segment.close()
    return path


def test_a_row_says_what_the_reply_says_and_whether_it_was_handed_over(tmp_path: Path) -> None:
    rows = RowFiles(tmp_path / "deep" / "folder", "jetson-0", BOOT)
    keep_block(rows, 5)
    rows.sent()
    keep_block(rows, 6)
    rows.refused(request_part(7))
    (path,) = files_in(tmp_path / "deep" / "folder")
    file = read_node_rows(path)  # while it is written
    assert (file.header.device, file.header.boot_id, file.missing, file.not_kept) == ("jetson-0", BOOT, 0, 0)
    first, second, third = (dict(zip(file.records.dtype.names or (), row, strict=True)) for row in file.records)
    assert {name: int(value) for name, value in first.items() if name != "commit"} == {
        "run_number": RUN, "round": 5, "node_received_ns": 1000, "node_sent_ns": 9000, "node_complete_ns": 1100,
        "node_queue_ns": 10, "node_dequantise_ns": 20, "node_compute_ns": 4300, "node_padding_ns": 4000,
        "node_quantise_ns": 50, "payload_bytes_down": 1088, "payload_bytes_up": 1087, "rows": 16, "width": 64,
        "attempt": 0, "layer": 3, "experts_touched": 2, "reply": Reply.SENT,
    }  # fmt: skip
    assert (second["round"], second["reply"]) == (6, Reply.COMPUTED)
    assert (third["round"], third["rows"], third["reply"]) == (7, 7, Reply.REFUSED)
    assert third["node_sent_ns"] == third["node_complete_ns"] == -1
    rows.close()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_value_that_a_column_can_hold_is_read_back(data: st.DataObject, tmp_path_factory: Any) -> None:
    def values(column: Any) -> st.SearchStrategy[int]:
        if column.name == "reply":
            return st.sampled_from([reply.value for reply in Reply])
        limits = np.iinfo(np.dtype(column.format))
        return st.integers(int(limits.min), int(limits.max))

    row = st.tuples(*map(values, NODE_RECORD))
    written = data.draw(st.lists(row, min_size=1, max_size=5))
    path = tmp_path_factory.mktemp("rows") / "some.seg"
    segment = NodeSegment(path, "é-0", 0, 2, 5)
    for values_of_row in written:
        segment.append(*values_of_row)
    segment.close()
    names = [column.name for column in NODE_RECORD]
    assert [tuple(map(int, row)) for row in read_node_rows(path).records[names]] == written


KEEP_FOREVER = """
import os, sys
from itertools import count
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_node_rows import BOOT, keep_block
from jetson_node.rows import RowFiles
rows = RowFiles(Path(sys.argv[1]), "jetson-0", BOOT, rows_per_file=100)
for number in count():
    keep_block(rows, number)
    rows.sent()
    os.write(1, b"%d\\n" % number)
"""


def test_kill_9_of_a_node_loses_no_row(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KEEP_FOREVER, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(257):
            process.stdout.readline()
        assert is_written(files_in(tmp_path)[-1])
        process.send_signal(signal.SIGKILL)
        *lines, _ = process.stdout.read().split(b"\n")
    last = int(lines[-1]) if lines else 256
    files = files_in(tmp_path)
    kept = [int(number) for path in files for number in read_node_rows(path).records["round"]]
    assert kept == list(range(len(kept)))
    assert last + 1 <= len(kept) <= last + 2
    assert not any(is_written(path) for path in files)


def test_a_row_without_its_mark_is_none(tmp_path: Path) -> None:
    path = filled(tmp_path / "torn.seg")
    with path.open("r+b") as file:
        first = PREAMBLE.unpack(file.read(PREAMBLE.size))[2]
        file.seek(first + 3 * DTYPE.itemsize - 8)
        file.write(bytes(8))
    assert read_node_rows(path).records["round"].tolist() == [0, 1]


def test_the_oldest_files_go_when_all_are_too_many_but_never_one_that_is_written(tmp_path: Path) -> None:
    living = RowFiles(tmp_path, "jetson-0", 1, rows_per_file=4)
    keep_block(living, 0)
    (written,) = files_in(tmp_path)
    old, older = filled(tmp_path / "old.seg"), filled(tmp_path / "older.seg")
    for age, path in enumerate((old, older, written)):
        os.utime(path, (1e9 - age, 1e9 - age))
    make_room(tmp_path, old.stat().st_size + written.stat().st_size)
    assert files_in(tmp_path) == [written, old]
    make_room(tmp_path, 0)
    assert files_in(tmp_path) == [written]
    living.close()


def test_a_node_that_served_nothing_leaves_no_file(tmp_path: Path) -> None:
    RowFiles(tmp_path, "jetson-0", BOOT).close()
    assert files_in(tmp_path) == []


def test_a_disk_without_room_is_said_once_counted_and_later_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RowFiles(tmp_path, "jetson-0", BOOT, rows_per_file=2)

    def no_room(*_: Any) -> NodeSegment:
        raise RunLogError("here: cannot be written (No space left on device)")

    monkeypatch.setattr(rows_module, "RETRY_NS", 0)
    with monkeypatch.context() as full:
        full.setattr(rows_module, "NodeSegment", no_room)
        for number in range(5):
            keep_block(rows, number)
            rows.sent()
    assert rows.figures() == {NOT_KEPT: 3 * DTYPE.itemsize}
    (line,) = capsys.readouterr().err.splitlines()
    assert "jetson-0: its own rows are not kept: here: cannot be written (No space left on device)" in line
    keep_block(rows, 5)
    rows.close()
    first, second = map(read_node_rows, files_in(tmp_path))
    assert (first.records["round"].tolist(), first.not_kept) == ([0, 1], 3)
    assert first.records["reply"].tolist() == [Reply.SENT] * 2
    assert (second.records["round"].tolist(), second.not_kept) == ([5], 0)


def test_rows_of_a_node_that_never_had_room_are_counted_in_the_first_file_it_can_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "RETRY_NS", 0)
    (tmp_path / "rows").write_text("in the way")
    rows = RowFiles(tmp_path / "rows", "jetson-0", BOOT)
    keep_block(rows, 0)
    (tmp_path / "rows").unlink()
    keep_block(rows, 1)
    (path,) = files_in(tmp_path / "rows")
    assert read_node_rows(path).not_kept == 1
    rows.close()


def test_the_disk_is_waited_for_only_after_a_second_without_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    rows, now_ns = RowFiles(tmp_path, "jetson-0", BOOT), 9000
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    keep_block(rows, 0)
    rows.rest()
    assert flushed == []
    now_ns = 9000 + 1_000_000_001
    for _ in range(3):
        rows.rest()
    assert len(flushed) == 1
    rows.close()


def rewritten(path: Path, change: Any, *, new_crc: bool = True) -> Path:
    """The file with another header."""
    data = path.read_bytes()
    magic, version, size, crc = PREAMBLE.unpack_from(data)
    header = json.loads(data[PREAMBLE.size : size])
    body = json.dumps(change(header)).encode().ljust(size - PREAMBLE.size)
    crc = zlib.crc32(body) if new_crc else crc
    path.write_bytes(PREAMBLE.pack(magic, version, size, crc) + body + data[size:])
    return path


HOSTILE = {
    "rows without end": lambda header: {**header, "rows": 2**40},
    "negative rows": lambda header: {**header, "rows": -1},
    "rows in words": lambda header: {**header, "rows": "many"},
    "more rows than bytes": lambda header: {**header, "rows": 100_000},
    "records of no size": lambda header: {**header, "record": {"itemsize": 0, "fields": [["commit", "|S0", [], 0]]}},
    "objects": lambda header: {**header, "record": {"itemsize": 8, "fields": [["commit", "|O", [], 0]]}},
    "no record": lambda header: {key: value for key, value in header.items() if key != "record"},
    "a list": lambda _: [],
    "another table": lambda header: {**header, "table": "rounds"},
    "a newer schema": lambda header: {**header, "schema": 1000},
    "a boot of text": lambda header: {**header, "boot_id": "x"},
    "a count elsewhere": lambda header: {**header, "lost_bytes": 2**60},
    "no count": lambda header: {**header, "lost_bytes": 0},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(tmp_path: Path, change: Any) -> None:
    path = rewritten(filled(tmp_path / "bad.seg"), change)
    with pytest.raises(RunLogError) as told:
        read_node_rows(path)
    assert str(told.value).startswith(f"{path}: ")
    assert len(str(told.value).splitlines()) == 1


def test_a_file_that_is_truncated_damaged_foreign_or_too_large_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole.seg").read_bytes()
    bad = {
        "empty": b"", "cut in the preamble": whole[:7], "cut in the header": whole[:300], "cut": whole[:-9],
        "nested": PREAMBLE.pack(b"WDMOELOG", 1, 2**20, 0) + b"[" * 2**20, "text": b"hello, this is no segment\n" * 9,
        "other bytes in the header": whole[:40] + b"\xff" + whole[41:],
    }  # fmt: skip
    reply_at = PREAMBLE.unpack_from(whole)[2] + FIELDS["reply"][1]
    bad["a reply of no kind"] = whole[:reply_at] + b"\x09" + whole[reply_at + 1 :]
    for name, data in bad.items():
        path = tmp_path / f"{name}.seg"
        path.write_bytes(data)
        with pytest.raises(RunLogError) as told:
            read_node_rows(path)
        assert len(str(told.value).splitlines()) == 1, name
    large = tmp_path / "large.seg"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(RunLogError, match="none of its rows"):
        read_node_rows(large)
    with pytest.raises(RunLogError, match="cannot be read"):
        read_node_rows(tmp_path / "none.seg")
    with pytest.raises(RunLogError, match="header is damaged"):
        read_node_rows(rewritten(filled(tmp_path / "crc.seg"), lambda header: {**header, "device": "x"}, new_crc=False))
