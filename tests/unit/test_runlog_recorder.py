from __future__ import annotations

import errno
import json
import os
import resource
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import RunLogError
from testbed.runlog import table_writer
from testbed.runlog.columns import KEY_NAMES, ROUND_COLUMNS, Column, columns_of, token_columns
from testbed.runlog.reader import losses, read_events, read_table
from testbed.runlog.recorder import OWN_COLUMNS, Recorder
from testbed.runlog.schema import TABLES

Values = dict[str, Any]


def random_values(rng: np.random.Generator, column: Column, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Any value the column can hold, among them the smallest, the largest and unknown."""
    dtype = np.dtype(column.format)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind == "f":
        values = rng.normal(size=shape).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        values = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.3, column.missing, values).astype(dtype) if column.nullable else values


@dataclass(frozen=True)
class Sizes:
    devices: int = 2
    top_k: int = 2
    experts: int = 4


def new_recorder(folder: Path, sizes: Sizes = Sizes(), **options: Any) -> Recorder:
    names = [f"device-{n}" for n in range(sizes.devices)]
    return Recorder(folder, "run", names, top_k=sizes.top_k, experts=sizes.experts, **options)


def random_round(number: int, rng: np.random.Generator, tokens: int, sizes: Sizes) -> tuple[Values, Values]:
    keys = dict.fromkeys(KEY_NAMES, number % 7) | {"round": number}
    given_rounds = [c for c in ROUND_COLUMNS if c.name not in OWN_COLUMNS["rounds"] and c.name not in KEY_NAMES]
    given_tokens = [c for c in columns_of("tokens", sizes.experts) if c.name not in OWN_COLUMNS["tokens"]]
    shapes: dict[str, tuple[int, ...]] = {"": (), "K": (sizes.top_k,), "E": (sizes.experts,)}
    of_devices = {c.name: random_values(rng, c, (sizes.devices,)) for c in given_rounds}
    return {**keys, **of_devices}, {c.name: random_values(rng, c, (tokens, *shapes[c.size])) for c in given_tokens}


def as_read(column: Column, values: np.ndarray[Any, Any]) -> list[Any]:
    """The values as Python objects, None for unknown."""
    unknown = np.isnan(values) if values.dtype.kind == "f" else values == column.missing
    objects = values.astype(object)
    objects[unknown & column.nullable] = None
    return list(objects.tolist())


def check_rows(rows: pa.Table, columns: Iterable[Column], given_values: Values) -> None:
    for column in columns:
        values = given_values.get(column.name)
        if isinstance(values, np.ndarray):
            assert rows[column.name].to_pylist() == as_read(column, values), column.name


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    sizes=st.builds(Sizes, st.integers(1, 5), st.integers(1, 4), st.sampled_from([0, 4, 8])),
    segment_rows=st.sampled_from([6, 64]),
)
def test_what_is_recorded_is_read_back_live_and_sealed(
    seed: int, tokens: list[int], sizes: Sizes, segment_rows: int
) -> None:
    rng = np.random.default_rng(seed)
    rounds = [random_round(number, rng, count, sizes) for number, count in enumerate(tokens)]
    with tempfile.TemporaryDirectory() as name:
        recorder = new_recorder(Path(name), sizes, segment_rows=segment_rows)
        for columns in rounds:
            recorder.record_round(*columns)
        live = [read_table(Path(name), table) for table in TABLES]
        recorder.close()
        assert not list(Path(name).glob("*.seg*"))
        of_devices, of_tokens = (read_table(Path(name), table) for table in TABLES)
    assert [of_devices.schema, of_tokens.schema] == [table.schema for table in live]
    assert [of_devices.to_pylist(), of_tokens.to_pylist()] == [table.to_pylist() for table in live]
    assert of_devices["device"].to_pylist() == list(range(sizes.devices)) * len(tokens)
    assert of_devices["tokens"].to_pylist() == np.repeat(tokens, sizes.devices).tolist()
    assert of_tokens["round"].to_pylist() == np.repeat(np.arange(len(tokens)), tokens).tolist()
    assert of_tokens["token"].to_pylist() == [token for count in tokens for token in range(count)]
    for number, (given_rounds, given_tokens) in enumerate(rounds):
        check_rows(of_devices.slice(number * sizes.devices, sizes.devices), ROUND_COLUMNS, given_rounds)
        check_rows(of_tokens.slice(sum(tokens[:number]), tokens[number]), token_columns(), given_tokens)


def one_round(number: int, tokens: int = 3) -> tuple[Values, Values]:
    return random_round(number, np.random.default_rng(number), tokens, Sizes())


def test_a_nullable_column_left_out_is_null_and_never_zero(tmp_path: Path) -> None:
    rounds, tokens = one_round(0)
    nullable = {column.name for column in ROUND_COLUMNS if column.nullable}
    with new_recorder(tmp_path) as recorder:
        recorder.record_round({k: v for k, v in rounds.items() if k not in nullable}, tokens)
        table = read_table(tmp_path, "rounds")
    for name in nullable:
        assert table[name].null_count == 2, name


def test_the_cost_of_recording_is_told_by_the_next_round(tmp_path: Path) -> None:
    with new_recorder(tmp_path) as recorder:
        for number in range(3):
            recorder.record_round(*one_round(number))
    first, _, second, _, third, _ = read_table(tmp_path, "rounds")["record_ns_previous"].to_pylist()
    assert first is None
    assert second > 0
    assert third > 0


def test_rolling_over_several_segments_keeps_the_order_and_splits_no_round(tmp_path: Path) -> None:
    with new_recorder(tmp_path, segment_rows=5) as recorder:
        for number in range(12):
            recorder.record_round(*one_round(number, tokens=7 if number == 4 else 2))
            recorder.flush()
    assert len(list(tmp_path.glob("rounds-*.parquet"))) == 6
    assert read_table(tmp_path, "rounds")["round"].to_pylist() == [n for n in range(12) for _ in range(2)]
    assert read_table(tmp_path, "tokens")["round"].to_pylist() == sorted([*range(12)] * 2 + [4] * 5)


def test_a_round_whose_columns_are_wrong_leaves_no_row(tmp_path: Path) -> None:
    with new_recorder(tmp_path) as recorder:
        rounds, tokens = one_round(0)
        with pytest.raises(RunLogError, match=r"unknown \['wait_s'\]"):
            recorder.record_round({**rounds, "wait_s": 1.0}, tokens)
        with pytest.raises(RunLogError, match=r"missing \['kept'\]"):
            recorder.record_round(rounds, {k: v for k, v in tokens.items() if k != "kept"})
        assert read_table(tmp_path, "rounds").num_rows == read_table(tmp_path, "tokens").num_rows == 0


def test_a_folder_that_holds_a_log_is_refused_and_left_alone(tmp_path: Path) -> None:
    with new_recorder(tmp_path) as recorder:
        recorder.record_round(*one_round(0))
        with pytest.raises(RunLogError, match="holds a log already"):
            new_recorder(tmp_path)
    with pytest.raises(RunLogError, match="holds a log already"):
        new_recorder(tmp_path)
    assert read_table(tmp_path, "rounds").num_rows == 2


def test_nothing_can_be_recorded_after_the_log_was_closed(tmp_path: Path) -> None:
    recorder = new_recorder(tmp_path)
    recorder.close()
    recorder.close()
    with pytest.raises(RunLogError, match="closed"):
        recorder.record_round(*one_round(0))
    with pytest.raises(RunLogError, match="closed"):
        recorder.event("late")
    with pytest.raises(RunLogError, match="closed"):
        recorder.flush()


@pytest.mark.parametrize("options", [{"score_dtype": "int8"}, {"segment_rows": 0}])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RunLogError):
        new_recorder(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses any longer file: what a full disk does, for this process only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_in_one_clear_line_counted_and_the_rows_so_far_stay_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table_writer, "RETRY_NS", 0)
    monkeypatch.setattr(table_writer.TableWriter, "look_ahead", lambda _: None)  # or there may be room already
    recorder = new_recorder(tmp_path, segment_rows=4)
    recorder.record_round(*one_round(0))
    recorder.record_round(*one_round(1, tokens=1))
    with largest_file(1000):
        recorder.record_round(*one_round(2))
        recorder.record_round(*one_round(3))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning: ") and "rows are lost" in line]
    assert recorder.lost == (2, 2 * (2 + 3), 0)
    assert not list(tmp_path.glob("*.tmp"))
    assert set(read_table(tmp_path, "rounds")["round"].to_pylist()) == {0, 1}
    recorder.record_round(*one_round(4))
    with pytest.raises(RunLogError, match=r"rounds lost: 2 \(10 rows\)") as caught:
        recorder.close()
    assert "\n" not in str(caught.value)
    for table, lost in (("rounds", 4), ("tokens", 6)):
        assert set(read_table(tmp_path, table)["round"].to_pylist()) == {0, 1, 4}
        assert losses(tmp_path, table).full_disk == lost


def test_no_space_left_on_the_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunLogError, match="No space left on device"):
        new_recorder(tmp_path)


def test_an_event_is_one_json_line_with_both_clocks(tmp_path: Path) -> None:
    with new_recorder(tmp_path) as recorder:
        recorder.event("node_lost", device=np.int64(3), after_s=np.nan, why="a\nb")
    (event,) = read_events(tmp_path)
    assert event["realtime_ns"] > 10**18
    assert event["monotonic_ns"] > 0
    assert {k: v for k, v in event.items() if not k.endswith("_ns")} == {
        "kind": "node_lost",
        "device": 3,
        "after_s": None,
        "why": "a\nb",
    }


def test_an_event_that_a_full_disk_cut_short_is_taken_back_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    recorder = new_recorder(tmp_path, say=said.append)
    recorder.event("first")
    size = (tmp_path / "events.jsonl").stat().st_size
    with largest_file(size + 10):
        recorder.event("second")
    assert "events find no room" in said[0]
    recorder.event("third")
    with pytest.raises(RunLogError, match="events lost: 1"):
        recorder.close()
    assert [event["kind"] for event in read_events(tmp_path)] == ["first", "third", "rows_lost"]


def test_an_unfinished_last_event_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "joined"}) + '\n{"kind": "lo')
    assert read_events(tmp_path) == [{"kind": "joined"}]
