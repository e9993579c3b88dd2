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
from testbed.runlog.reader import read_table
from testbed.runlog.seal import seal_run
from testbed.runlog.segment import PREAMBLE, Segment, read_segment

ROW = np.dtype([("round", "<u8"), ("rtt_ns", "<i8"), ("commit", "<u8")], align=True)


def left_behind(run_dir: Path, rows: int = 5, number: int = 0) -> Path:
    """A segment as a killed recorder leaves it."""
    segment = Segment(run_dir / f"rounds-{number:04d}.seg", {"run_id": "run"}, ROW, capacity=8)
    segment.columns["round"][:rows] = np.arange(rows) + 10 * number
    segment.columns["rtt_ns"][:rows] = np.arange(rows) - 1
    segment.commit(rows)
    return segment.path


def mark(path: Path, index: int, value: int) -> None:
    """Overwrite the commit mark of one record."""
    (_, _, first_byte, _) = PREAMBLE.unpack(path.read_bytes()[: PREAMBLE.size])
    with path.open("r+b") as file:
        file.seek(first_byte + (index + 1) * ROW.itemsize - 8)
        file.write(value.to_bytes(8, "little"))


def test_sealing_replaces_the_segment_by_an_equal_zstd_parquet_file(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    live = read_table(tmp_path, "rounds")
    (sealed,) = seal_run(tmp_path)
    assert not path.exists()
    assert read_table(tmp_path, "rounds").equals(live)
    assert live["rtt_ns"].to_pylist() == [None, 0, 1, 2, 3]
    parquet = pq.ParquetFile(sealed)
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
    lock = seal.hold(tmp_path)
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


def test_rows_behind_a_gap_are_reported_read_up_to_it_and_never_deleted(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    mark(path, 2, 0)
    with pytest.warns(UserWarning, match="rows 2 to 2 never reached the disk"):
        assert read_table(tmp_path, "rounds")["round"].to_pylist() == [0, 1]
    with pytest.raises(RunLogError, match="rows 2 to 2 never reached the disk"):
        seal_run(tmp_path)
    assert path.exists()


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
    content = bytearray(sealed.read_bytes())
    content[60] ^= 1
    sealed.write_bytes(content)
    with pytest.raises(RunLogError, match=r"rounds-0000\.parquet"):
        read_table(tmp_path, "rounds")


def test_a_folder_without_rows_and_an_unknown_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no rounds in this folder"):
        read_table(tmp_path, "rounds")
    with pytest.raises(RunLogError, match="rounds and tokens"):
        read_table(tmp_path, "nodes")
