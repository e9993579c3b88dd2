"""What the links truly did, joined to the base station's rows: both written by hand, times in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from testbed.channel.record import DOWN, UP, Frame, LinkRecord, Route
from testbed.experiment.truth import LinkTruth, link_truth

MS = 1_000_000
NAN = float("nan")
Passed = tuple[int, int, float, float, float]  # device, direction, in, out, of that on the air; ms

# Two rounds of device 0: [0, 100] and [200, 300]. The node has the block at 30 and 230, and replies at 60 and 260.
REQUESTS = [(0, DOWN, 1, 15, 10), (0, DOWN, 2, 29, 12), (0, DOWN, 201, 225, 20)]
REPLIES = [(0, UP, 61, 80, 15), (0, UP, 61, 95, 14), (0, UP, 262, 290, 25)]


def rounds_of(*rows: dict[str, Any]) -> pa.Table:
    """Rows as the log gives them back: unknown is null. Times in ms."""
    names = ("bs_sent", "node_received", "node_sent", "bs_received")
    columns: dict[str, Any] = {
        f"{name}_ns": pa.array([None if row.get(name) is None else row[name] * MS for row in rows], pa.int64())
        for name in names
    }
    columns["device"] = pa.array([row.get("device", 0) for row in rows], pa.uint16())
    columns["rows"] = pa.array([row.get("rows", 4) for row in rows], pa.uint32())
    return pa.table(columns)


FIRST = {"bs_sent": 0, "node_received": 30, "node_sent": 60, "bs_received": 100}
SECOND = {"bs_sent": 200, "node_received": 230, "node_sent": 260, "bs_received": 300}
NO_REPLY = {"bs_sent": 400, "node_received": None, "node_sent": None, "bs_received": None}
NOT_SENT = {"rows": 0}


def truth_of(folder: Path, passed: Sequence[Passed], *rows: dict[str, Any], shared: bool = False) -> LinkTruth:
    record = LinkRecord(["jetson-0", "jetson-1"])
    for device, direction, in_ms, out_ms, air_ms in sorted(passed, key=lambda one: one[3]):  # in order of delivery
        frame = Frame(Route(device, direction, 0), int(in_ms * MS), 0, 0)
        frame.air_ns = air_ms * MS
        record.add(frame, out_ms * MS, out_ms * MS, int(out_ms * MS))
    record.write(folder / "links.parquet")
    truth = link_truth(folder, rounds_of(*rows), shared=shared)
    assert truth is not None
    return LinkTruth(*(column / MS for column in truth))


def test_a_block_is_down_with_its_last_part_and_up_with_that_of_its_reply(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, REQUESTS + REPLIES, FIRST, SECOND)
    assert truth.down_ns.tolist() == [29, 25]
    assert truth.up_ns.tolist() == [35, 30]


def test_what_the_channel_asked_for_is_the_sum_over_a_blocks_parts(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, REQUESTS + REPLIES, FIRST, SECOND)
    assert truth.down_air_ns.tolist() == [22, 20]
    assert truth.up_air_ns.tolist() == [29, 25]


def test_on_shared_air_the_turns_of_others_between_a_blocks_parts_are_the_channels_too(tmp_path: Path) -> None:
    own = truth_of(tmp_path, REQUESTS + REPLIES, FIRST, SECOND)
    truth = truth_of(tmp_path, REQUESTS + REPLIES, FIRST, SECOND, shared=True)
    assert truth.down_air_ns.tolist() == [29 - 1, 225 - 201]
    assert truth.up_air_ns.tolist() == [95 - 61, 290 - 262]
    np.testing.assert_array_equal([truth.down_ns, truth.up_ns], [own.down_ns, own.up_ns])


@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_rows_does_not_matter(tmp_path: Path, shared: bool) -> None:
    there = truth_of(tmp_path, REQUESTS + REPLIES, FIRST, SECOND, shared=shared)
    back = truth_of(tmp_path, REQUESTS + REPLIES, SECOND, FIRST, shared=shared)
    np.testing.assert_array_equal(np.array(there)[:, ::-1], np.array(back))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("direction", [DOWN, UP])
def test_heartbeats_between_rounds_do_not_count(tmp_path: Path, direction: int, shared: bool) -> None:
    usual = truth_of(tmp_path, REQUESTS + REPLIES, FIRST, SECOND, shared=shared)
    heartbeats = [(0, direction, at, at + 30, 9) for at in (-50, 105, 150, 199.5, 301, 999)]
    found = truth_of(tmp_path, [*REQUESTS, *REPLIES, *heartbeats], FIRST, SECOND, shared=shared)
    np.testing.assert_array_equal(np.array(found), np.array(usual))


@pytest.mark.parametrize(("shared", "air_ms"), [(False, 22), (True, 28)])
@pytest.mark.parametrize("at_ms", [30, 40, 59])
def test_what_goes_down_once_the_node_has_the_block_is_no_part_of_the_request(
    tmp_path: Path, at_ms: int, shared: bool, air_ms: float
) -> None:
    echo = (0, DOWN, at_ms, at_ms + 10, 3)
    truth = truth_of(tmp_path, [*REQUESTS, *REPLIES, echo], FIRST, shared=shared)
    assert (truth.down_ns[0], truth.down_air_ns[0]) == (29, air_ms)


def test_what_a_node_said_before_its_reply_is_no_part_of_the_reply(tmp_path: Path) -> None:
    announcement = (0, UP, 31, 45, 3)
    truth = truth_of(tmp_path, [*REQUESTS, *REPLIES, announcement], FIRST)
    assert (truth.up_ns[0], truth.up_air_ns[0]) == (35, 29)


def test_another_devices_frames_are_its_own(tmp_path: Path) -> None:
    others = [(1, DOWN, 3, 27, 22), (1, UP, 70, 99, 20)]
    truth = truth_of(tmp_path, [*REQUESTS, *REPLIES, *others], FIRST, {**FIRST, "device": 1})
    assert truth.down_ns.tolist() == [29, 27]
    assert truth.up_ns.tolist() == [35, 39]
    assert truth.down_air_ns.tolist() == [22, 22]
    assert truth.up_air_ns.tolist() == [29, 20]


@pytest.mark.parametrize("row", [NO_REPLY, NOT_SENT])
def test_a_row_without_a_reply_is_unknown(tmp_path: Path, row: dict[str, Any]) -> None:
    truth = truth_of(tmp_path, [*REQUESTS, *REPLIES, (0, DOWN, 401, 420, 9)], FIRST, row, SECOND)
    for column in truth:
        assert np.isnan(column).tolist() == [False, True, False]


def test_where_nothing_was_answered_all_is_unknown(tmp_path: Path) -> None:
    assert np.isnan(np.array(truth_of(tmp_path, REQUESTS, NO_REPLY, NOT_SENT))).all()


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_of_which_the_relay_saw_nothing_has_no_known_times(tmp_path: Path, shared: bool) -> None:
    truth = truth_of(tmp_path, [(1, DOWN, 1, 2, 1)], FIRST, shared=shared)
    assert np.isnan([truth.down_ns[0], truth.up_ns[0]]).all()
    assert (truth.down_air_ns[0], truth.up_air_ns[0]) == (0, 0)


def test_links_that_were_not_emulated_have_no_record(tmp_path: Path) -> None:
    assert link_truth(tmp_path, rounds_of(FIRST)) is None
