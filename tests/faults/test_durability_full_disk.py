"""A real file system without room: what is lost is said at once and counted, and what was written stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from testbed.cli import main
from testbed.errors import RunLogError
from testbed.runlog import table_writer
from testbed.runlog.columns import ROUND_COLUMNS
from testbed.runlog.reader import losses, read_events, read_table
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import TABLES
from testbed.runlog.seal import seal_run

DEVICES, TOKENS, SEGMENT_ROWS = 2, 3, 1000
MANY = 20_000  # rounds: more than fit
ROWS = {c.name: 0 for c in ROUND_COLUMNS if not c.nullable and c.name not in ("device", "tokens")} | {"dilation": 1}
PAIRS: dict[str, Any] = dict.fromkeys(
    ("expert", "asked", "weight", "kept", "device", "final_weight"), [[0, 0]] * TOKENS
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def recorder(small_disk: Path, said: list[str]) -> Recorder:
    run_dir = small_disk / "20260101-000000-full"
    run_dir.mkdir()
    return Recorder(run_dir, "run", ["a", "b"], top_k=2, experts=0, segment_rows=SEGMENT_ROWS, say=said.append)


def record(recorder: Recorder, number: int) -> None:
    recorder.record_round({**ROWS, "round": number}, {**PAIRS, "orphaned": False})


def record_until_lost(recorder: Recorder) -> int:
    """The first round that found no room."""
    for number in range(MANY):
        record(recorder, number)
        if recorder.lost.rounds:
            return number
    raise AssertionError("the disk took everything")


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return ballast


def of_rounds(rounds: range | list[int], each: int) -> list[int]:
    return [number for number in rounds for _ in range(each)]


def test_a_round_that_finds_no_room_is_said_at_once_and_counted_and_those_before_stay_readable(
    recorder: Recorder, small_disk: Path, said: list[str]
) -> None:
    first = record_until_lost(recorder)
    for number in range(first + 1, first + 10):
        record(recorder, number)
    (once,) = (text for text in said if "rows are lost from here on" in text)  # not with every round
    assert "No space left on device" in once
    assert not any("\n" in text for text in said)
    run_dir = small_disk / "20260101-000000-full"
    for table, each in (("rounds", DEVICES), ("tokens", TOKENS)):
        assert read_table(run_dir, table)["round"].to_pylist() == of_rounds(range(first), each)
        assert losses(run_dir, table).full_disk == 10 * each, "what a reader finds now, and after a kill"
    assert recorder.lost == (10, 10 * (DEVICES + TOKENS), 0)
    with pytest.raises(RunLogError, match=r"not complete.*rounds lost: 10 \(50 rows\), events lost: 0"):
        recorder.close()
    for table, each in (("rounds", DEVICES), ("tokens", TOKENS)):
        assert read_table(run_dir, table)["round"].to_pylist() == of_rounds(range(first), each)
        assert losses(run_dir, table).full_disk == 10 * each, "sealed"
    (event,) = (event for event in read_events(run_dir) if event["kind"] == "rows_lost")
    assert (event["rounds"], event["rows"], event["events"]) == (10, 50, 0)


def test_a_log_that_cannot_be_sealed_on_a_full_disk_is_recovered_once_there_is_room(
    recorder: Recorder, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = record_until_lost(recorder)
    recorder._keeper.stop()  # it tries again for room, and what it took meanwhile comes free
    ballast, run_dir = fill(small_disk), small_disk / "20260101-000000-full"
    recorder.event("finds_no_room", why="x" * 5000)
    with pytest.raises(RunLogError, match=r"rounds lost: 1 .*events lost: 1.*testbed logs recover"):
        recorder.close()
    assert read_table(run_dir, "rounds")["round"].to_pylist() == of_rounds(range(first), DEVICES)
    assert all(event["kind"] != "finds_no_room" for event in read_events(run_dir)), "no torn line"
    assert main(["logs", "recover", str(run_dir), "--json"]) == RunLogError.exit_code, "still full"
    ballast.unlink()
    capsys.readouterr()
    assert main(["logs", "recover", str(run_dir), "--json"]) == 0
    (recovered,) = json.loads(capsys.readouterr().out)["recovered"]
    assert recovered["lost"] == DEVICES + TOKENS
    assert not [*run_dir.glob("*.seg*"), *run_dir.glob("*.tmp")]
    for table, each in (("rounds", DEVICES), ("tokens", TOKENS)):
        assert read_table(run_dir, table)["round"].to_pylist() == of_rounds(range(first), each)


def test_recording_goes_on_once_there_is_room_again(
    recorder: Recorder, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_writer, "RETRY_NS", 0)
    ballast = fill(small_disk)
    first = record_until_lost(recorder)
    ballast.unlink()
    record(recorder, first + 1)
    assert recorder.lost.rounds == 1
    with pytest.raises(RunLogError, match="rounds lost: 1 "):
        recorder.close()
    rounds = [*range(first), first + 1]
    assert read_table(small_disk / "20260101-000000-full", "rounds")["round"].to_pylist() == of_rounds(rounds, DEVICES)


def test_an_error_under_way_is_not_hidden_by_a_log_that_is_not_complete(recorder: Recorder, said: list[str]) -> None:
    def interrupted() -> None:
        with recorder:
            record_until_lost(recorder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "not complete" in said[-1]


def test_a_recorder_killed_on_a_full_disk_leaves_its_count_of_lost_rows(small_disk: Path) -> None:
    run_dir = small_disk / "killed"
    run_dir.mkdir()
    child = os.fork()
    if child == 0:
        try:
            lost_there = Recorder(run_dir, "run", ["a", "b"], top_k=2, experts=0, segment_rows=SEGMENT_ROWS, say=len)  # type: ignore[arg-type]
            record_until_lost(lost_there)
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert losses(run_dir, "rounds").full_disk == DEVICES
    seal_run(run_dir)
    assert [losses(run_dir, table).full_disk for table in TABLES] == [DEVICES, TOKENS]
