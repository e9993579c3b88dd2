"""What is on the disk when the power goes. No plug is pulled here: the system calls are watched, and files are made as
a power cut may leave them, without any of the pages that were not brought to the disk.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.runlog.keeper import KEEP_EVERY_S, Keeper
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import ROUND_COLUMNS
from testbed.runlog.segment import Segment, read_segment

PATIENCE_S, PAGE = 60, 4096
ROWS = {c.name: 0 for c in ROUND_COLUMNS if not c.nullable and c.name not in ("device", "tokens")} | {"dilation": 1}
PAIRS = {name: [[0, 0]] for name in ("expert", "asked", "weight", "kept", "device", "final_weight")}
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


@settings(max_examples=60, deadline=None)
@given(flushed=st.integers(0, 300), later=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_whatever_pages_a_power_cut_takes_the_rows_on_the_disk_before_it_are_read_back(
    flushed: int, later: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds-0000.seg"
        segment = Segment(path, {"run_id": "run"}, RECORD, capacity=600)
        _append(segment, flushed)
        segment.flush()
        on_disk = path.read_bytes()
        _append(segment, later)
        written = path.read_bytes()
        rng = np.random.default_rng(seed)
        starts = range(0, len(written), PAGE)
        pages = [(on_disk, written)[rng.integers(2)][at : at + PAGE] for at in starts]
        path.write_bytes(b"".join(pages))
        _, records, _ = read_segment(path)
        assert flushed <= len(records) <= flushed + later
        assert records["round"][:flushed].tolist() == list(range(flushed))
        assert (records["rtt_ns"][:flushed] == np.arange(flushed)[:, None]).all()


def _append(segment: Segment, rows: int) -> None:
    first, end = segment.used, segment.used + rows
    segment.columns["round"][first:end] = np.arange(first, end)
    segment.columns["rtt_ns"][first:end] = np.arange(first, end)[:, None]
    segment.commit(rows)
