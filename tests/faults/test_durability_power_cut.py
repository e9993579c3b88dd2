"""What is on the disk when the power goes. No plug is pulled here: the system calls are watched, and files are made as
a power cut may leave them, without any of the pages that were not brought to the disk.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from testbed.cli import main
from testbed.runlog.columns import ROUND_COLUMNS
from testbed.runlog.keeper import KEEP_EVERY_S, Keeper
from testbed.runlog.manifest import write_manifest
from testbed.runlog.reader import losses, read_events, read_table
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import TABLES
from testbed.runlog.seal import seal_run
from testbed.runlog.segment import Segment, read_segment

PATIENCE_S, PAGE = 60, 4096
DEVICES, TOKENS, ROUNDS = 2, 3, 150
ROWS = {c.name: 0 for c in ROUND_COLUMNS if not c.nullable and c.name not in ("device", "tokens")} | {"dilation": 1}
PAIRS = {name: [[0, 0]] for name in ("expert", "asked", "weight", "kept", "device", "final_weight")}
PAIRS_OF_TOKENS = {name: TOKENS * pairs for name, pairs in PAIRS.items()}
RECORD = np.dtype([("round", "<u8"), ("rtt_ns", "<i8", (9,)), ("commit", "<u8")], align=True)


class Disk:
    """Notes which files are brought to the disk, and by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._synced, self._changed, self._fsync = list[tuple[str, str]](), threading.Condition(), os.fsync
        monkeypatch.setattr(os, "fsync", self._note)

    def _note(self, file: int) -> None:
        self._fsync(file)
        with self._changed:
            self._synced.append((Path(f"/proc/self/fd/{file}").readlink().name, threading.current_thread().name))
            self._changed.notify_all()

    def forget(self) -> None:
        with self._changed:
            self._synced.clear()

    def wait_for(self, *names: str) -> set[str]:
        """Until all of them were brought there; returns the threads that did it."""
        with self._changed:
            there = self._changed.wait_for(lambda: set(names) <= {name for name, _ in self._synced}, PATIENCE_S)
            assert there, f"{names}: only {self._synced}"
            return {thread for _, thread in self._synced}


def test_rows_of_a_base_station_that_falls_idle_are_brought_to_the_disk_by_another_thread_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    with Recorder(tmp_path, "run", ["a"], top_k=2, experts=0, segment_rows=4) as recorder:
        disk.wait_for("rounds-0000.seg", "tokens-0000.seg", tmp_path.name)
        disk.forget()
        recorder.event("begun")
        recorder.record_round({**ROWS, "round": 0}, {**PAIRS, "orphaned": False})
        assert disk.wait_for("rounds-0000.seg", "tokens-0000.seg", "events.jsonl") == {"run log"}
        disk.forget()
        for number in range(1, 6):
            recorder.record_round({**ROWS, "round": number}, {**PAIRS, "orphaned": False})
        disk.wait_for("rounds-0000.seg", "rounds-0001.seg", "tokens-0001.seg", tmp_path.name)


def test_rows_wait_half_a_second_at_most_so_that_a_slow_disk_has_the_other_half() -> None:
    assert KEEP_EVERY_S <= 0.5
    calls = threading.Semaphore(0)
    keeper = Keeper(calls.release)
    for _ in range(3):
        assert calls.acquire(timeout=PATIENCE_S)
    keeper.stop()


def test_a_woken_keeper_does_not_wait_for_its_time_and_a_stopped_one_does_nothing_more() -> None:
    calls = threading.Semaphore(0)
    keeper = Keeper(calls.release, every_s=10 * PATIENCE_S)
    keeper.wake()
    assert calls.acquire(timeout=PATIENCE_S)
    keeper.stop()
    keeper.wake()
    assert not calls.acquire(blocking=False)


class Cut(NamedTuple):
    """What a power cut leaves of a file that has grown since it was brought to the disk: each page as it was then, or
    as it was written later."""

    before: bytes
    after: bytes

    def left(self, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        starts = range(0, len(self.after), PAGE)
        return b"".join((self.before, self.after)[rng.integers(2)][at : at + PAGE] for at in starts)


@settings(max_examples=60, deadline=None)
@given(flushed=st.integers(0, 300), later=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_whatever_pages_a_power_cut_takes_all_rows_on_the_disk_and_only_whole_ones_are_read_back(
    flushed: int, later: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds-0000.seg"
        segment = Segment(path, {"run_id": "run"}, RECORD, capacity=600)
        _append(segment, flushed)
        segment.flush()
        on_disk = path.read_bytes()
        _append(segment, later)
        path.write_bytes(Cut(on_disk, path.read_bytes()).left(seed))
        _, records, missing, remains = read_segment(path)
        rounds = records["round"]
        assert rounds[:flushed].tolist() == list(range(flushed))
        assert (np.diff(rounds.astype(int)) > 0).all()
        assert (records["rtt_ns"] == rounds[:, None]).all(), "no row is in part from before it was written"
        assert len(records) + missing <= flushed + later
        assert missing or not remains


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=29676)  # of the last round there is, a part is
def test_after_a_power_cut_recover_seals_every_whole_round_counts_the_others_and_shows_them(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "20260101-000000-cut"
        kept = _cut_off(run_dir, seed)
        sealed = seal_run(run_dir)
        rounds = read_table(run_dir, "rounds")
        numbers = rounds["round"].to_pylist()
        assert set(range(kept)) <= set(numbers) <= set(range(ROUNDS))
        assert numbers == [number for number in sorted(set(numbers)) for _ in range(DEVICES)]
        assert rounds["rtt_ns"].to_pylist() == numbers
        tokens = read_table(run_dir, "tokens")
        assert {row["round"] for row in tokens.to_pylist() if row["weight"] != [row["round"], 1]} == set()
        missing = sum(part.missing for part in sealed)
        lost = losses(run_dir, *TABLES)
        assert (lost.missing, lost.full_disk) == (missing, 0)
        told = [event for event in read_events(run_dir) if event["kind"] == "rows_missing"]
        assert sum(event["rows"] for event in told) == missing
        assert {path.suffix for path in run_dir.iterdir()} <= {".jsonl", ".parquet", ".damaged", ".json", ".npz"}
        assert len(list(run_dir.glob("*.damaged"))) == sum(part.damaged is not None for part in sealed)


def test_recover_says_in_one_line_what_a_power_cut_took_and_show_and_ls_tell_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "20260101-000000-cut"
    _cut_off(run_dir, seed=3)
    manifest = {"config": {}, "policies": ["topk"], "devices": list("ab"), "links": "loopback", "emulated": {}}
    write_manifest(run_dir, manifest)
    assert main(["logs", "recover", str(run_dir), "--json"]) == 0
    printed = capsys.readouterr()
    (recovered,) = json.loads(printed.out.splitlines()[-1])["recovered"]
    assert recovered["missing"] > 0
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{run_dir.name}: {recovered['missing']} rows did not reach the disk whole")
    assert all(name in line for name in recovered["damaged"])
    for command in (["ls"], ["show", "latest"]):
        assert main(["logs", *command, "--logs", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        assert "INCOMPLETE" in printed.out
        assert f"{recovered['missing']} missing after a power cut" in printed.out + printed.err
        assert main(["logs", *command, "--logs", str(tmp_path), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document.get("runs", [document])[0]["losses"] == {"full_disk": 0, "missing": recovered["missing"]}


def _cut_off(run_dir: Path, seed: int) -> int:
    """A run as a power cut leaves it; returns how many of its rounds had been brought to the disk."""
    run_dir.mkdir()
    kept = seed % ROUNDS
    recorder = Recorder(run_dir, "run", ["a", "b"], top_k=2, experts=0, segment_rows=2 * DEVICES * ROUNDS)
    for number in range(ROUNDS):
        if number == kept:
            recorder.flush()
            before = {path: path.read_bytes() for path in run_dir.glob("*.seg")}
        weight = [[number, 1]] * TOKENS
        recorder.record_round(
            {**ROWS, "round": number, "rtt_ns": number}, {**PAIRS_OF_TOKENS, "weight": weight, "orphaned": False}
        )
    left = {
        path: Cut(content, path.read_bytes()).left(seed + number)
        for number, (path, content) in enumerate(before.items())
    }
    recorder.close()
    for path in run_dir.iterdir():
        path.unlink()
    for path, content in left.items():
        path.write_bytes(content)
    return kept


def _append(segment: Segment, rows: int) -> None:
    first, end = segment.used, segment.used + rows
    segment.columns["round"][first:end] = np.arange(first, end)
    segment.columns["rtt_ns"][first:end] = np.arange(first, end)[:, None]
    segment.commit(rows)
