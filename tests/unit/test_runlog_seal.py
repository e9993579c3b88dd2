from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from testbed.errors import RunLogError
from testbed.runlog import seal
from testbed.runlog.events import hold
from testbed.runlog.reader import losses, read_events, read_table
from testbed.runlog.seal import seal_run
from testbed.runlog.segment import Segment, read_segment
from testbed.runlog.segment_header import PREAMBLE

ROW = np.dtype([("round", "<u8"), ("rtt_ns", "<i8"), ("commit", "<u8")], align=True)


def left_behind(run_dir: Path, rows: int = 5, number: int = 0) -> Path:
    """A segment as a killed recorder leaves it."""
    segment = Segment(run_dir / f"rounds-{number:04d}.seg", {"run_id": "run"}, ROW, capacity=8)
    segment.columns["round"][:rows] = np.arange(rows) + 10 * number
    segment.columns["rtt_ns"][:rows] = np.arange(rows) - 1
    segment.commit(rows)
    return segment.path


def first_byte(path: Path) -> int:
    return int(PREAMBLE.unpack(path.read_bytes()[: PREAMBLE.size])[2])


def mark(path: Path, index: int, value: int) -> None:
    """Overwrite the commit mark of one record."""
    with path.open("r+b") as file:
        file.seek(first_byte(path) + (index + 1) * ROW.itemsize - 8)
        file.write(value.to_bytes(8, "little"))


def test_sealing_replaces_the_segment_by_an_equal_zstd_parquet_file(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    live = read_table(tmp_path, "rounds")
    (sealed,) = seal_run(tmp_path)
    assert not path.exists()
    assert read_table(tmp_path, "rounds").equals(live)
    assert live["rtt_ns"].to_pylist() == [None, 0, 1, 2, 3]
    parquet = pq.ParquetFile(sealed.path)
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads(parquet.schema_arrow.metadata[b"wdmoe"])["run_id"] == "run"


def test_sealing_again_changes_nothing(tmp_path: Path) -> None:
    left_behind(tmp_path)
    assert len(seal_run(tmp_path)) == 1
    assert seal_run(tmp_path) == []
    assert read_table(tmp_path, "rounds").num_rows == 5


@pytest.mark.parametrize("step", ["write_table", "rename", "read_back", "unlink"])
def test_a_seal_interrupted_at_any_step_loses_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = left_behind(tmp_path)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        targets: dict[str, tuple[Any, str]] = {
            "write_table": (pq, "write_table"),
            "rename": (Path, "rename"),
            "read_back": (seal, "read_parquet"),
            "unlink": (Path, "unlink"),
        }
        patch.setattr(*targets[step], stop)
        with pytest.raises(KeyboardInterrupt):
            seal_run(tmp_path)
        assert path.exists()
        assert read_table(tmp_path, "rounds")["round"].to_pylist() == list(range(5))
    seal_run(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "rounds-0000.parquet"]
    assert read_table(tmp_path, "rounds")["round"].to_pylist() == list(range(5))


def test_a_segment_whose_parquet_reads_back_short_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_behind(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(seal, "read_parquet", lambda file: pq.read_table(file).slice(1))
        with pytest.raises(RunLogError, match="4 rows read back of 5"):
            seal_run(tmp_path)
    assert path.exists()


def test_a_run_that_is_being_recorded_cannot_be_sealed_by_another(tmp_path: Path) -> None:
    left_behind(tmp_path)
    lock = hold(tmp_path)
    with pytest.raises(RunLogError, match="still being recorded"):
        seal_run(tmp_path)
    os.close(lock)
    assert seal_run(tmp_path)


def test_a_torn_last_row_is_not_read_and_the_rows_before_it_are(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    mark(path, 5, 6 << 32)
    assert read_table(tmp_path, "rounds")["round"].to_pylist() == list(range(5))
    seal_run(tmp_path)
    assert read_table(tmp_path, "rounds").num_rows == 5


def test_rows_around_a_gap_are_read_and_sealed_and_those_that_are_missing_are_counted(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    mark(path, 2, 0)
    with pytest.warns(UserWarning, match="1 rows never reached the disk"):
        live = read_table(tmp_path, "rounds")
    assert live["round"].to_pylist() == [0, 1, 3, 4]
    (sealed,) = seal_run(tmp_path)
    assert (sealed.rows, sealed.missing, sealed.damaged) == (4, 1, path.with_suffix(".damaged"))
    assert not path.exists()
    assert read_segment(path.with_suffix(".damaged")).missing == 1, "what is left of the row stays"
    assert read_table(tmp_path, "rounds").equals(live)
    assert losses(tmp_path, "rounds") == (None, 1)
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["part"], event["rows"]) == ("rows_missing", "rounds-0000", 1)


def test_a_segment_of_which_nothing_is_left_but_what_was_sealed_is_removed(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    with path.open("r+b") as file:
        file.seek(first_byte(path) + 2 * ROW.itemsize)
        file.write(bytes(ROW.itemsize))
    (sealed,) = seal_run(tmp_path)
    assert (sealed.rows, sealed.missing, sealed.damaged) == (4, 1, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "rounds-0000.parquet"]


def test_a_row_whose_mark_is_there_and_whose_other_bytes_are_not_is_missing(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    for byte in range(ROW.itemsize - 8):
        content = bytearray(path.read_bytes())
        content[first_byte(path) + 3 * ROW.itemsize + byte] ^= 1
        torn = tmp_path / "torn.seg"
        torn.write_bytes(content)
        rows = read_segment(torn)
        assert (rows.records["round"].tolist(), rows.missing, rows.remains) == ([0, 1, 2, 4], 1, True), byte


def test_a_round_that_lost_a_row_is_not_sealed_so_that_every_round_has_one_for_each_device(
    tmp_path: Path,
) -> None:
    segment = Segment(tmp_path / "rounds-0000.seg", {"table": "rounds", "devices": ["a", "b"]}, ROW, capacity=8)
    segment.columns["round"][:6] = [0, 0, 1, 1, 2, 2]
    for _ in range(3):
        segment.commit(2)
    mark(segment.path, 3, 0)
    (sealed,) = seal_run(tmp_path)
    assert (sealed.rows, sealed.missing) == (4, 2)
    assert read_table(tmp_path, "rounds")["round"].to_pylist() == [0, 0, 2, 2]


def test_a_last_round_that_has_only_begun_is_neither_read_nor_missing(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "rounds-0000.seg", {"table": "rounds", "devices": ["a", "b"]}, ROW, capacity=8)
    segment.commit(3)
    rows = read_segment(segment.path)
    assert (len(rows.records), rows.missing, rows.remains) == (2, 0, False)


def test_of_a_segment_without_checksums_only_rows_before_the_gap_are_believed(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "rounds-0000.seg", {}, ROW, capacity=8, checked=False)
    segment.columns["round"][:5] = np.arange(5)
    for index in (0, 1, 3, 4):
        mark(segment.path, index, index + 1)
    (sealed,) = seal_run(tmp_path)
    assert (sealed.rows, sealed.missing, sealed.damaged) == (2, 3, tmp_path / "rounds-0000.damaged")
    assert read_table(tmp_path, "rounds")["round"].to_pylist() == [0, 1]


@pytest.mark.parametrize("torn", [b'{"kind": "torn', bytes(700), b'{"kind": 1\n\0\0\n', b"[1]\n"])
def test_what_a_crash_left_behind_the_last_event_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    left_behind(tmp_path)
    whole = b'{"kind": "a"}\n{"kind": "b"}\n'
    (tmp_path / "events.jsonl").write_bytes(whole + torn)
    seal_run(tmp_path)
    assert (tmp_path / "events.jsonl").read_bytes() == whole


def test_a_part_that_cannot_be_sealed_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    os.truncate(left_behind(tmp_path, number=0), 10)
    left_behind(tmp_path, number=1)
    with pytest.raises(RunLogError, match=r"rounds-0000\.seg"):
        seal_run(tmp_path)
    assert (tmp_path / "rounds-0000.seg").exists()
    assert (tmp_path / "rounds-0001.parquet").exists()


def test_sealed_and_live_segments_are_read_together_in_order(tmp_path: Path) -> None:
    left_behind(tmp_path, 2, number=0)
    seal_run(tmp_path)
    left_behind(tmp_path, 3, number=1)
    assert read_table(tmp_path, "rounds")["round"].to_pylist() == [0, 1, 10, 11, 12]


def test_a_missing_part_of_the_log_is_named(tmp_path: Path) -> None:
    left_behind(tmp_path, number=0).unlink()
    left_behind(tmp_path, number=1)
    with pytest.raises(RunLogError, match="rounds-0000: this part of the log is missing"):
        read_table(tmp_path, "rounds")


@pytest.mark.parametrize("keep", [0, 10, PREAMBLE.size, 3000, 4096, 4096 + ROW.itemsize])
def test_a_truncated_segment_is_one_clear_line(tmp_path: Path, keep: int) -> None:
    path = left_behind(tmp_path)
    os.truncate(path, keep)
    with pytest.raises(RunLogError) as caught:
        read_table(tmp_path, "rounds")
    assert "\n" not in str(caught.value)
    with pytest.raises(RunLogError):
        seal_run(tmp_path)
    assert path.exists()


def test_a_flipped_bit_in_the_header_is_noticed(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    content = path.read_bytes()
    for position in (0, 9, 13, 17, 100, 4000):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RunLogError):
            read_segment(path)


def test_a_segment_that_describes_python_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rounds-0000.seg"
    plain = np.dtype([("round", "<u8"), ("commit", "<u8")])
    Segment(path, {}, plain, capacity=1)
    content = path.read_bytes()
    body = content[PREAMBLE.size : 4096].replace(b'"<u8"', b'"|O"', 1).ljust(4096 - PREAMBLE.size)
    magic, version, size, _ = PREAMBLE.unpack(content[: PREAMBLE.size])
    path.write_bytes(PREAMBLE.pack(magic, version, size, zlib.crc32(body)) + body + content[4096:])
    with pytest.raises(RunLogError, match="header is damaged"):
        read_segment(path)


@pytest.mark.parametrize("name", ["rounds-0000.seg", "rounds-0000.parquet"])
def test_a_foreign_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GIF89a" + bytes(9000))
    with pytest.raises(RunLogError) as caught:
        read_table(tmp_path, "rounds")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_sealed_page_is_noticed(tmp_path: Path) -> None:
    left_behind(tmp_path)
    (sealed,) = seal_run(tmp_path)
    content = bytearray(sealed.path.read_bytes())
    content[60] ^= 1
    sealed.path.write_bytes(content)
    with pytest.raises(RunLogError, match=r"rounds-0000\.parquet"):
        read_table(tmp_path, "rounds")


def test_a_folder_without_rows_and_an_unknown_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no rounds in this folder"):
        read_table(tmp_path, "rounds")
    with pytest.raises(RunLogError, match="rounds and tokens"):
        read_table(tmp_path, "nodes")
