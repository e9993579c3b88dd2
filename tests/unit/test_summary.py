"""What sealing keeps of a run beside its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import RunLogError
from testbed.runlog import summary
from testbed.runlog.histogram import bin_of, middle_ns, quantiles_ns
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import PHASES, Status
from testbed.runlog.seal import seal_run
from testbed.runlog.segment import read_segment
from testbed.runlog.segment_header import LOST
from testbed.runlog.summary import HISTOGRAMS, SUMMARY, exact_summary, histogram_of, summary_of
from testbed.runlog.summary_rows import is_stretched
from testbed.runlog.summary_tally import QUANTILES

MS = 1_000_000
TOKENS = {
    "expert": [[0]],
    "weight": [[1.0]],
    "asked": [[0]],
    "kept": [[True]],
    "device": [[0]],
    "final_weight": [[1.0]],
}


def round_of(number: int, **columns: Any) -> dict[str, Any]:
    """A round of two devices, both asked; the second answers last."""
    return {
        "round": number, "policy": 0, "prompt": 0, "layer": 0, "phase": 0, "attempt": 0, "rows": 1,
        "experts_touched": 1, "bytes_down": 1, "bytes_up": 1, "parts_down": 1, "parts_up": 1, "status": 1,
        "state_available": True, "dilation": 1.0, "round_ns": 10 * MS, "bs_sent_ns": 100 * MS,
        "bs_received_ns": [105 * MS, 109 * MS], **columns,
    }  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    def record(*rounds: dict[str, Any], orphaned: bool = False, close: bool = True, segment_rows: int = 4) -> Path:
        recorder = Recorder(tmp_path, "run", ["a", "b"], top_k=1, experts=0, segment_rows=segment_rows)
        for columns in rounds:
            recorder.record_round(columns, {**TOKENS, "orphaned": [orphaned]})
        if close:
            recorder.close()
        return tmp_path

    return record


durations = st.lists(st.integers(0, 10**13), min_size=1, max_size=200)


@given(durations, st.sampled_from([1.0, 10.0, 40.0]), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_quantile_of_the_histogram_is_within_one_per_cent_of_the_rows_own(
    values: list[int], dilation: float, quantile: float
) -> None:
    duration_ns_V = np.array(values) / dilation
    bin_B, count_B = np.unique(bin_of(duration_ns_V), return_counts=True)
    (found,) = quantiles_ns(bin_B, count_B, [quantile], duration_ns_V.min(), duration_ns_V.max())
    assert found == pytest.approx(np.quantile(duration_ns_V, quantile), rel=0.01, abs=1e-3)


@given(st.floats(1e-3, 1e14))
def test_the_middle_of_a_bin_is_within_half_a_per_cent_of_what_is_in_it(duration_ns: float) -> None:
    assert middle_ns(bin_of(np.array([duration_ns])))[0] == pytest.approx(duration_ns, rel=0.0051)


def test_sealing_leaves_a_summary_that_equals_one_made_from_the_rows(recorded: Callable[..., Path]) -> None:
    run_dir = recorded(*(round_of(number, rtt_ns=(number + 1) * MS) for number in range(5)))
    assert len(list(run_dir.glob("rounds-*.parquet"))) == 3
    kept = summary_of(run_dir)
    (run_dir / SUMMARY).unlink()
    assert summary_of(run_dir) == kept
    assert (run_dir / SUMMARY).exists()
    rtt = kept.get(0, 0, 1, "rtt_ns")
    assert rtt is not None
    assert (rtt.count, rtt.sum_ns, rtt.min_ns, rtt.max_ns) == (5, 15 * MS, MS, 5 * MS)
    assert rtt.p50_ns == pytest.approx(3 * MS, rel=0.01)


def test_exact_quantiles_are_those_of_the_rows(recorded: Callable[..., Path]) -> None:
    rtt_ns = [7 * MS, 3 * MS, 12345, 9 * MS, 5 * MS, 11 * MS]
    run_dir = recorded(*(round_of(number, rtt_ns=value) for number, value in enumerate(rtt_ns)))
    rtt = exact_summary(run_dir).get(0, 0, 0, "rtt_ns")
    assert rtt is not None
    assert (rtt.p50_ns, rtt.p95_ns, rtt.p99_ns) == pytest.approx(tuple(np.quantile(rtt_ns, QUANTILES)))


def test_the_histogram_of_every_series_holds_all_of_its_durations(recorded: Callable[..., Path]) -> None:
    run_dir = recorded(*(round_of(number, rtt_ns=[MS, 2 * MS], wait_ns=3 * MS) for number in range(4)))
    for place, series in enumerate(summary_of(run_dir).series):
        bin_B, count_B = histogram_of(run_dir, place)
        assert count_B.sum() == series.count
        if series.column != "record_ns_previous":
            assert middle_ns(bin_B) == pytest.approx(series.p50_ns, rel=0.01)


def test_links_nodes_and_the_wait_for_them_are_divided_by_the_dilation_and_the_base_stations_own_compute_is_not(
    recorded: Callable[..., Path],
) -> None:
    columns = {phase.column: 8 * MS for phase in PHASES if phase.column and phase.name != "record"}
    run_dir = recorded(round_of(0, dilation=4.0, clock_bound_ns=MS, **columns))
    found = {series.column: series.max_ns for series in summary_of(run_dir).series}
    own = {"select_ns", "group_ns", "quantise_ns", "staging_ns", "send_ns", "dequantise_ns", "combine_ns"}
    assert {name for name in columns if found[name] == 8 * MS} == own
    assert all(found[name] == 2 * MS for name in columns if is_stretched(name))
    assert found["clock_bound_ns"] == MS / 4


def test_what_the_base_station_does_once_per_round_counts_once(recorded: Callable[..., Path]) -> None:
    found = summary_of(recorded(round_of(0, select_ns=MS, send_ns=MS)))
    select = found.get(0, 0, None, "select_ns")
    assert select is not None
    assert select.count == 1
    assert [found.get(0, 0, device, "send_ns") is not None for device in (0, 1)] == [True, True]


def test_an_unknown_duration_is_no_zero(recorded: Callable[..., Path]) -> None:
    found = summary_of(recorded(round_of(0, rtt_ns=[MS, -1], status=[Status.ANSWERED, Status.LOST])))
    assert found.get(0, 0, 1, "rtt_ns") is None
    assert found.get(0, 0, 0, "down_ns") is None
    assert [(node.requests, node.lost) for node in found.nodes] == [(1, 0), (1, 1)]


def test_the_node_that_answers_last_is_the_rounds_bottleneck(recorded: Callable[..., Path]) -> None:
    last_first = round_of(1, bs_received_ns=[109 * MS, 103 * MS], dilation=2.0)
    alone = round_of(2, rows=[1, 0], bs_received_ns=[104 * MS, -1], status=[1, 0])
    a, b = summary_of(recorded(round_of(0), last_first, alone)).nodes
    assert (a.bottleneck, b.bottleneck) == (2, 1)
    assert (a.alone_ns, b.alone_ns) == ((6 / 2 + 4) * MS, 4 * MS)
    assert (a.requests, b.requests) == (3, 2)


def test_a_late_node_is_the_bottleneck_and_not_the_one_that_answered_last(recorded: Callable[..., Path]) -> None:
    late = round_of(0, status=[Status.LATE, Status.ANSWERED], bs_received_ns=[-1, 105 * MS])
    a, b = summary_of(recorded(late)).nodes
    assert (a.bottleneck, a.late, a.alone_ns) == (1, 1, 0)
    assert b.bottleneck == 0


def test_orphaned_tokens_are_counted(recorded: Callable[..., Path]) -> None:
    (counts,) = summary_of(recorded(round_of(0), round_of(1), orphaned=True)).phases
    assert (counts.rounds, counts.routed, counts.orphaned) == (2, 2, 2)


def test_a_run_that_is_recorded_is_summed_up_anew_each_time_and_nothing_is_kept(recorded: Callable[..., Path]) -> None:
    run_dir = recorded(round_of(0), close=False)
    assert summary_of(run_dir).rows == 2
    assert not (run_dir / SUMMARY).exists()


def test_a_killed_run_gets_its_summary_when_it_is_asked_for_and_again_when_it_is_sealed(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    recorded(round_of(0), round_of(1), close=False)
    killed = tmp_path / "killed"
    killed.mkdir()
    for path in tmp_path.glob("*-*.seg"):
        (killed / path.name).write_bytes(path.read_bytes())
    before = summary_of(killed)
    assert (killed / SUMMARY).exists()
    seal_run(killed)
    kept = json.loads((killed / SUMMARY).read_text())
    assert sorted(kept["files"]) == ["rounds-0000.parquet", "tokens-0000.parquet"]
    assert summary_of(killed).series == before.series


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 99}', ""])
def test_a_damaged_summary_is_made_again(recorded: Callable[..., Path], damage: str) -> None:
    run_dir = recorded(round_of(0, rtt_ns=MS))
    kept = summary_of(run_dir)
    (run_dir / SUMMARY).write_text(damage)
    assert summary_of(run_dir) == kept
    assert json.loads((run_dir / SUMMARY).read_text())["rows"] == 2


@pytest.mark.parametrize("name", [SUMMARY, HISTOGRAMS])
def test_a_summary_that_was_not_written_whole_is_no_summary_and_the_rows_stay_sealed(
    recorded: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        run_dir = recorded(round_of(0))
    assert not (run_dir / SUMMARY).exists()
    assert not list(run_dir.glob("*.tmp"))
    assert pq.read_table(run_dir / "rounds-0000.parquet").num_rows == 2
    assert summary_of(run_dir).rows == 2


def test_rows_that_are_missing_are_told_and_the_others_summed_up(recorded: Callable[..., Path], tmp_path: Path) -> None:
    segment = recorded(round_of(0), round_of(1), close=False) / "rounds-0000.seg"
    header, records, *_ = read_segment(segment)
    content = bytearray(segment.read_bytes())
    first = len(content) - LOST.itemsize - header["rows"] * records.itemsize
    content[first + 2 * records.itemsize - 8 : first + 2 * records.itemsize] = bytes(8)
    cut_off = tmp_path / "cut-off"  # the recorder still has its own in memory
    cut_off.mkdir()
    (cut_off / segment.name).write_bytes(content)
    with pytest.warns(UserWarning, match="2 rows never reached the disk"):
        assert summary_of(cut_off).rows == 2


def test_an_older_run_without_dilation_is_summed_up(recorded: Callable[..., Path]) -> None:
    run_dir = recorded(round_of(0, rtt_ns=MS))
    path = run_dir / "rounds-0000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["dilation", "down_ns", "clock_bound_ns"]), path)
    rtt = summary_of(run_dir).get(0, 0, 0, "rtt_ns")
    assert rtt is not None
    assert rtt.max_ns == MS


def test_a_run_without_any_round_has_an_empty_summary(recorded: Callable[..., Path]) -> None:
    run_dir = recorded()
    assert summary_of(run_dir).series == []
    assert exact_summary(run_dir).rows == 0


def test_a_folder_without_rows_a_missing_part_and_a_foreign_file_are_named(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunLogError, match="no rounds in this folder"):
        summary_of(empty)
    run_dir = recorded(*(round_of(number) for number in range(5)))
    (run_dir / "rounds-0002.parquet").write_bytes(b"GIF89a")
    with pytest.raises(RunLogError, match=r"rounds-0002\.parquet: cannot be read"):
        summary_of(run_dir)
    (run_dir / "rounds-0001.parquet").unlink()
    with pytest.raises(RunLogError, match="rounds-0001: this part of the log is missing"):
        summary.summary_of(run_dir)
