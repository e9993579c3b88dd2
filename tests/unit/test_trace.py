from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_rounds import BOUND_NS, POLICIES, Recorded, record_rounds

from testbed.cli import main
from testbed.errors import ConfigError, RunLogError
from testbed.runlog.chrome_trace import Track, chrome_trace
from testbed.runlog.reader import read_events, read_table
from testbed.runlog.schema import Status
from testbed.runlog.trace import write_trace
from testbed.runlog.trace_round import PADDING, Row, Span, station_pieces

Event = dict[str, Any]
ROUNDS_TID, EVENTS_TID = 13, 14


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record_rounds(tmp_path_factory.mktemp("runs") / "20260101-000000-made-up", rounds=40)


@pytest.fixture(scope="module")
def events(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    write_trace(recorded.folder, path)
    return read_trace(path)


def read_trace(path: Path) -> list[Event]:
    """Its events, times as whole nanoseconds, cut off as Perfetto cuts them off."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: list[Event] = json.loads(data)["traceEvents"]
    for event in found:
        for name in {"ts", "dur"} & event.keys():
            event[f"{name}_ns"] = int(event[name] * 1000)
    return found


def slices(events: list[Event], category: str) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["cat"] == category]


def origin_ns(recorded: Recorded) -> int:
    return int(read_events(recorded.folder)[0]["monotonic_ns"])


def test_every_round_is_drawn_no_earlier_than_it_was_and_no_later_than_it_says(
    recorded: Recorded, events: list[Event]
) -> None:
    drawn = slices(events, "round")
    assert [event["args"]["round"] for event in drawn] == list(range(40))
    for event, began_ns, ended_ns in zip(drawn, recorded.began_ns, recorded.ended_ns, strict=True):
        too_late_ns = event["ts_ns"] + origin_ns(recorded) - began_ns
        assert 0 <= too_late_ns <= event["args"]["began_earlier_by_at_most_ns"]
        assert event["dur_ns"] == ended_ns - began_ns


def test_a_block_stands_on_the_base_stations_clock_within_its_bound(recorded: Recorded, events: list[Event]) -> None:
    blocks = [event for event in slices(events, "node") if event["name"] == "block"]
    assert len(blocks) == recorded.count(Status.ANSWERED) == len(recorded.received_ns)
    for block in blocks:
        truth_ns = recorded.received_ns[block["args"]["round"], block["pid"] - 2]
        assert abs(block["ts_ns"] + origin_ns(recorded) - truth_ns) <= block["args"]["clock_bound_ns"] == BOUND_NS


def test_what_needed_the_nodes_clock_carries_the_uncertainty(recorded: Recorded, events: list[Event]) -> None:
    on_devices = [event for event in events if event["ph"] == "X" and event["pid"] > 1]
    assert {event["args"]["clock_bound_ns"] for event in on_devices} == {BOUND_NS}
    counted = [event for event in events if event["ph"] == "C" and event["name"] == "clock bound"]
    assert [event["args"]["ns"] for event in counted] == [BOUND_NS] * recorded.count(Status.ANSWERED)


def test_a_way_is_down_block_up_without_a_gap_or_an_overlap(events: list[Event]) -> None:
    ways = defaultdict(dict)
    for event in [*slices(events, "link"), *slices(events, "node")]:
        if event["name"] in ("down", "block", "up"):
            ways[event["args"]["round"], event["pid"]][event["name"]] = event
    assert ways
    for way in ways.values():
        for before, after in pairwise([way["down"], way["block"], way["up"]]):
            assert before["ts_ns"] + before["dur_ns"] == after["ts_ns"]


def test_padding_is_marked_as_emulated_and_lies_at_the_end_of_the_compute(events: list[Event]) -> None:
    padding = slices(events, "emulated")
    compute_end_ns = {
        (event["pid"], event["ts_ns"] + event["dur_ns"])
        for event in slices(events, "node")
        if event["name"] == "compute"
    }
    assert {event["name"] for event in padding} == {PADDING}
    assert {event["pid"] for event in padding} == {2}
    assert {(event["pid"], event["ts_ns"] + event["dur_ns"]) for event in padding} <= compute_end_ns


def test_losses_and_events_are_instants_and_power_is_a_counter(recorded: Recorded, events: list[Event]) -> None:
    instants = [event for event in events if event["ph"] == "i"]
    losses = [event for event in instants if event["cat"] == "loss"]
    assert len(losses) == recorded.count(Status.LATE) + recorded.count(Status.LOST) > 0
    assert {event["name"] for event in losses} == {"late", "lost"}
    rare = {event["name"]: event["pid"] for event in instants if event["cat"] == "event"}
    assert rare == {"node_joined": 2, "node_lost": 3, "scored": 1}
    (power,) = [event for event in events if event["ph"] == "C" and event["name"] == "power"]
    assert (power["pid"], power["args"]) == (4, {"W": 7.5})


def test_policies_and_prompts_are_slices_around_their_rounds(events: list[Event]) -> None:
    assert [event["name"] for event in slices(events, "policy")] == POLICIES
    assert [event["name"] for event in slices(events, "prompt")] == ["prompt 0", "prompt 1"] * 2
    rounds = slices(events, "round")
    first, second = slices(events, "policy")
    assert first["ts_ns"] == rounds[0]["ts_ns"]
    assert second["ts_ns"] + second["dur_ns"] == rounds[-1]["ts_ns"] + rounds[-1]["dur_ns"]


def assert_nested(events: list[Event]) -> None:
    """Of two slices of a track one holds the other, or one is over when the other begins."""
    of_track = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            of_track[event["pid"], event["tid"]].append((event["ts_ns"], event["ts_ns"] + event["dur_ns"]))
    for spans in of_track.values():
        open_until_ns: list[int] = []
        for start_ns, end_ns in sorted(spans, key=lambda span: (span[0], -span[1])):
            assert start_ns <= end_ns
            while open_until_ns and open_until_ns[-1] <= start_ns:
                open_until_ns.pop()
            assert not open_until_ns or end_ns <= open_until_ns[-1]
            open_until_ns.append(end_ns)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 5), rounds=st.integers(4, 9))
def test_slices_of_a_track_never_overlap(
    tmp_path_factory: pytest.TempPathFactory, seed: int, devices: int, rounds: int
) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    made = record_rounds(folder, rounds=max(rounds, 4), devices=max(devices, 3), seed=seed)
    write_trace(made.folder, folder / "trace.json")
    assert_nested(read_trace(folder / "trace.json"))


def any_row(**known: Any) -> Row:
    return Row(**{**dict.fromkeys(Row._fields), "status": 1, "round": 0, "device": 0, **known})  # type: ignore[arg-type]


LENGTH_NS = st.one_of(st.none(), st.integers(0, 1000))


@given(
    lengths=st.fixed_dictionaries(
        dict.fromkeys(
            ("select_ns", "group_ns", "quantise_ns", "send_ns", "wait_ns", "dequantise_ns", "combine_ns"), LENGTH_NS
        )
    ),
    sent_ns=st.lists(st.one_of(st.none(), st.integers(0, 3000)), min_size=1, max_size=4),
    round_ns=st.integers(0, 3000),
)
def test_phases_follow_each_other_inside_the_round_whatever_a_log_says(
    lengths: dict[str, int | None], sent_ns: list[int | None], round_ns: int
) -> None:
    span = Span([any_row(bs_sent_ns=at_ns, round_ns=round_ns, **lengths) for at_ns in sent_ns], 500, None)
    pieces = list(station_pieces(span))
    times = [time for piece in pieces for time in (piece.start_ns, piece.end_ns)]
    assert times == sorted(times)
    assert 500 <= times[0] <= times[-1] == 500 + round_ns
    assert pieces[-1].name == "combine"


def test_a_block_without_a_clock_offset_is_one_round_trip(tmp_path: Path) -> None:
    made = record_rounds(tmp_path / "run")
    change(made, lambda table: with_column(table, "clock_offset_s", pa.nulls(table.num_rows, pa.float64())))
    figures = write_trace(made.folder, tmp_path / "trace.json").document()
    assert figures["blocks"] == figures["flows"] == 0
    assert figures["blocks_without_offset"] == recorded_answers(made)
    events = read_trace(tmp_path / "trace.json")
    assert slices(events, "node") == slices(events, "link") == []
    assert {event["name"] for event in slices(events, "clock offset unknown")} == {"there and back"}


def test_an_older_run_without_newer_columns_is_drawn(tmp_path: Path) -> None:
    made = record_rounds(tmp_path / "run")
    newer = ["bandwidth_hz", "measured_down_bits_per_s", "measured_up_bits_per_s", "asked_down_bits_per_s"]
    change(made, lambda table: table.drop_columns(newer))
    assert write_trace(made.folder, tmp_path / "trace.json").written.blocks == recorded_answers(made)


def test_a_round_in_which_nothing_was_sent_has_no_place_and_is_counted(tmp_path: Path) -> None:
    made = record_rounds(tmp_path / "run")

    def forget(table: pa.Table) -> pa.Table:
        values = [
            None if number == 3 else at for number, at in zip(*columns(table, "round", "bs_sent_ns"), strict=True)
        ]
        return with_column(table, "bs_sent_ns", pa.array(values, pa.int64()))

    change(made, forget)
    written = write_trace(made.folder, tmp_path / "trace.json").written
    assert (written.rounds, written.rounds_without_stamps) == (11, 1)


def columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def change(made: Recorded, how: Any) -> None:
    pq.write_table(how(read_table(made.folder, "rounds")), made.folder / "rounds-0000.parquet")


def recorded_answers(made: Recorded) -> int:
    return made.count(Status.ANSWERED)


def test_policy_and_rounds_choose_what_is_drawn(recorded: Recorded, tmp_path: Path) -> None:
    for arguments, expected in (
        ({"policy": 1}, range(20, 40)),
        ({"rounds": (5, 9)}, range(5, 9)),
        ({"policy": 0, "rounds": (15, 40)}, range(15, 20)),
    ):
        path = tmp_path / f"{expected.start}.json.gz"
        write_trace(recorded.folder, path, **arguments)  # type: ignore[arg-type]
        assert [event["args"]["round"] for event in slices(read_trace(path), "round")] == list(expected)


def test_events_of_a_choice_are_its_own_and_what_came_meanwhile(recorded: Recorded, tmp_path: Path) -> None:
    choices: dict[str, dict[str, Any]] = {"first": {"policy": 0}, "second": {"policy": 1}, "some": {"rounds": (30, 40)}}
    found = {}
    for name, choice in choices.items():
        write_trace(recorded.folder, tmp_path / name, **choice)
        found[name] = {event["name"] for event in read_trace(tmp_path / name) if event.get("cat") == "event"}
    assert found == {"first": {"node_lost"}, "second": {"scored"}, "some": set()}


def test_a_choice_of_nothing_is_refused_and_leaves_no_file(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no round"):
        write_trace(recorded.folder, tmp_path / "trace.json", policy=7)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_when_told(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    path.write_text("precious")
    call = ["logs", "trace", str(recorded.folder), "--out", str(path)]
    assert main(call) == ConfigError.exit_code
    assert "--force" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert main([*call, "--force"]) == 0
    assert read_trace(path)


def test_a_trace_that_fails_half_way_leaves_no_file(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("testbed.runlog.trace._write_events", fail)
    with pytest.raises(RunLogError, match="No space left"):
        write_trace(recorded.folder, tmp_path / "trace.json.gz")
    assert list(tmp_path.iterdir()) == []


def test_the_same_log_gives_the_same_bytes(recorded: Recorded, tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz"):
        write_trace(recorded.folder, tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_the_command_answers_with_one_line_of_json(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    arguments = ["--rounds", ":10", "--out", str(path), "--json"]
    assert main(["logs", "trace", recorded.folder.name, "--logs", str(recorded.folder.parent), *arguments]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["rounds"], document["file"], document["bytes"]) == (10, str(path), path.stat().st_size)
    assert document["flows"] == 2 * document["blocks"]


@pytest.mark.parametrize("text", ["5", "9:2", "a:b", "-1:4", "3:3"])
def test_a_range_that_is_none_is_one_line(recorded: Recorded, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "trace", str(recorded.folder), f"--rounds={text}"]) == 2
    assert "give A:B" in capsys.readouterr().err


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    times_ns = [0, 1, 999, 1001, *np.random.default_rng(0).integers(0, 10**14, 5000).tolist()]
    with chrome_trace(tmp_path / "trace.json", 0) as trace:
        for time_ns in times_ns:
            trace.slice(Track(1, 1), "a", time_ns, 2 * time_ns, "b")
    read = [(event["ts_ns"], event["dur_ns"]) for event in read_trace(tmp_path / "trace.json")]
    assert read == [(time_ns, time_ns) for time_ns in times_ns]
