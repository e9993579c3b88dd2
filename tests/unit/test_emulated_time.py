"""Emulated time, from rows written by hand: two devices a round, times in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.channel.record import DOWN, UP, Frame, LinkRecord, Route
from testbed.experiment.emulated_time import EMULATED_ROUND, PATH, eq8_sum_s, overhead_of_rounds, with_emulated_times
from testbed.latency.model import ComputeModel
from testbed.policies.base import DROPPED
from testbed.runlog.schema import GenerationPhase, Status

MS = 1_000_000
NS_COLUMNS = ("round", "bs_sent", "bs_received", "node_received", "node_sent", "node_padding", "node_compute")
COUNTS = (
    ("device", pa.uint16()), ("status", pa.uint8()), ("rows", pa.uint32()), ("experts_touched", pa.uint16()),
    ("policy", pa.uint16()), ("prompt", pa.int32()), ("bytes_down", pa.uint64()), ("bytes_up", pa.uint64()),
)  # fmt: skip
MODEL = {"base_s": 0.004, "expert_s": 0.004, "row_s": 0.004}  # four rows: 20 ms, stretched by 5 it is 100 ms


def manifest_of(emulated: dict[str, Any] | None = None, **radio: Any) -> dict[str, Any]:
    """Two devices, both as slow as MODEL if nothing else is said."""
    both = {"a": MODEL, "b": MODEL} if emulated is None else emulated
    return {"devices": ["a", "b"], "emulated": both, "config": {"radio": radio or None}}


def row(number: int = 0, **changed: Any) -> dict[str, Any]:
    """A device's part in a round of 110 ms in which it computed for 100 ms, of which 90 were added."""
    start = 1000 * number
    usual = {
        "number": number, "status": Status.ANSWERED, "rows": 4, "device": 0, "dilation": 5.0, "round": 110,
        "experts_touched": 2, "policy": 0, "prompt": 0, "bytes_down": 1000, "bytes_up": 500,
        "bs_sent": start, "node_received": start + 30, "node_sent": start + 60, "bs_received": start + 100,
        "node_padding": 90, "node_compute": 100,
    }  # fmt: skip
    return {**usual, **changed}


def idle(number: int = 0, device: int = 1, status: Status = Status.IDLE, **changed: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(NS_COLUMNS[1:])
    rows = 0 if status is Status.IDLE else 4
    touched = {"device": device, "status": status, "rows": rows, "experts_touched": rows // 2, "bytes_up": 0}
    touched["bytes_down"] = 250 * rows
    return row(number, **{**unknown, **touched, **changed})


def table_of(*rows: dict[str, Any]) -> pa.Table:
    """As the log gives it back: unknown is null."""
    columns: dict[str, Any] = {
        f"{name}_ns": pa.array([None if row[name] is None else int(row[name] * MS) for row in rows], pa.int64())
        for name in NS_COLUMNS
    }
    columns["round"] = pa.array([row["number"] for row in rows], pa.uint64())
    columns["dilation"] = pa.array([row["dilation"] for row in rows], pa.float32())
    for name, kind in COUNTS:
        columns[name] = pa.array([int(row[name]) for row in rows], kind)
    return pa.table(columns)


def links(folder: Path, *passed: tuple[int, float, float], others_ms: float = 0.0) -> None:
    """Frames of device 0: direction, in (ms), time on the air (ms); each waits `others_ms` for its turn."""
    record = LinkRecord(["a", "b"])
    for direction, in_ms, air_ms in passed:
        frame = Frame(Route(0, direction, 0), int(in_ms * MS), 0, 0)
        frame.air_ns = air_ms * MS
        end_ms = in_ms + others_ms + air_ms
        record.add(frame, end_ms * MS, end_ms * MS, int(end_ms * MS))
    record.write(folder / "links.parquet")


Events = list[dict[str, Any]]


def path_ms(
    folder: Path, *rows: dict[str, Any], manifest: dict[str, Any] | None = None, events: Events | None = None
) -> list[float]:
    table = with_emulated_times(folder, table_of(*rows), manifest or manifest_of(), events or [])
    return [round(ns / MS, 9) for ns in table[PATH].to_pylist()]


@given(round_ms=st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([1.0, 5.0, 10.0])), min_size=1, max_size=5))
def test_a_rounds_emulated_time_is_its_real_time_by_the_dilation(round_ms: list[tuple[int, float]]) -> None:
    rows = [row(number, round=ms, dilation=dilation) for number, (ms, dilation) in enumerate(round_ms)]
    found = with_emulated_times(Path("nowhere"), table_of(*rows), manifest_of(), [])[EMULATED_ROUND].to_pylist()
    assert found == pytest.approx([ms * MS / dilation for ms, dilation in round_ms])


def test_the_log_keeps_all_its_columns(tmp_path: Path) -> None:
    table = table_of(row(), idle())
    found = with_emulated_times(tmp_path, table, manifest_of(), [])
    assert found.column_names == [*table.column_names, EMULATED_ROUND, PATH]


def test_a_padded_compute_is_what_the_device_asked_for(tmp_path: Path) -> None:
    assert path_ms(tmp_path, row(), idle()) == [100, 0]


def test_compute_that_took_longer_than_the_device_asked_for_is_this_machines_own(tmp_path: Path) -> None:
    overran = row(node_padding=0, node_compute=180, round=190)
    assert path_ms(tmp_path, overran) == [100]
    assert overheads(tmp_path, overran) == pytest.approx([0.90])


def test_the_compute_of_a_device_that_plays_no_other_is_this_machines_own(tmp_path: Path) -> None:
    only_b = manifest_of({"b": MODEL})
    assert path_ms(tmp_path, row(), row(device=1), manifest=only_b) == [0, 100]


@settings(deadline=None)
@given(
    model=st.builds(ComputeModel, base_s=st.floats(0, 1), expert_s=st.floats(0, 1), row_s=st.floats(0, 1)),
    rows=st.integers(0, 1000),
    experts=st.integers(1, 8),
    factor=st.floats(1, 100),
    dilation=st.sampled_from([1.0, 5.0, 10.0]),
)
def test_what_a_device_asks_for_is_its_model_times_its_factor_stretched(
    model: ComputeModel, rows: int, experts: int, factor: float, dilation: float
) -> None:
    manifest = manifest_of({"a": {"base_s": model.base_s, "expert_s": model.expert_s, "row_s": model.row_s}})
    table = table_of(row(rows=rows, experts_touched=experts, dilation=dilation))
    found = with_emulated_times(Path("nowhere"), table, manifest, [channel(0, factor=[factor, 1.0])])[PATH].to_pylist()
    assert found == pytest.approx([1e9 * model.seconds(rows, experts) * factor * dilation])


def test_a_prompts_factor_is_of_its_own_policy_prompt_and_device(tmp_path: Path) -> None:
    rows = [row(), row(policy=1), row(prompt=1), row(device=1), idle()]
    events = [channel(0, policy=1, factor=[3.0, 5.0]), {"kind": "scored", "policy": 0, "prompt": 0}]
    assert path_ms(tmp_path, *rows, events=events) == [100, 300, 100, 100, 0]
    assert path_ms(tmp_path, *rows, events=[channel(0, factor=[3.0, 5.0])]) == [300, 100, 100, 500, 0]


def test_channel_and_device_add_up(tmp_path: Path) -> None:
    links(tmp_path, (DOWN, 1, 20), (DOWN, 2, 5), (UP, 61, 30), (UP, 500, 99))
    assert path_ms(tmp_path, row(), idle()) == [155, 0]


def test_delay_counts_once_each_way_and_is_stretched(tmp_path: Path) -> None:
    delayed = manifest_of(delay_s=0.001)
    links(tmp_path, (DOWN, 1, 20), (UP, 61, 30))
    assert path_ms(tmp_path, row(), idle(), manifest=delayed) == [100 + 20 + 30 + 2 * 5, 0]


@pytest.mark.parametrize(("medium", "others_ms"), [("fdd", 0), ("tdd", 6 + 6), ("shared", 6 + 6)])
def test_the_turns_of_others_on_the_same_air_are_the_channels(tmp_path: Path, medium: str, others_ms: float) -> None:
    links(tmp_path, (DOWN, 1, 20), (UP, 61, 30), others_ms=6)
    assert path_ms(tmp_path, row(), idle(), manifest=manifest_of(medium=medium)) == [150 + others_ms, 0]


def test_links_without_a_record_take_what_their_bytes_need_at_the_prompts_rates(tmp_path: Path) -> None:
    rows = [row(), row(device=1), row(prompt=1), row(policy=1), idle()]
    rates = {"down_bits_per_s": [1e6, 2e6], "up_bits_per_s": [0.5e6, 4e6]}
    events = [{**channel(0, factor=[1.0, 1.0]), **rates}]
    own_ms, other_ms = 5 * (8.0 + 8.0), 5 * (4.0 + 1.0)
    found = path_ms(tmp_path, *rows, manifest=manifest_of(medium="fdd"), events=events)
    assert found == [100 + own_ms, 100 + other_ms, 100, 100, 0]


def test_without_a_reply_nothing_is_known_to_have_been_asked_for(tmp_path: Path) -> None:
    links(tmp_path, (DOWN, 1, 20))
    assert path_ms(tmp_path, idle(device=0, status=Status.LATE, bs_sent=0), idle()) == [0, 0]


def overheads(folder: Path, *rows: dict[str, Any], manifest: dict[str, Any] | None = None) -> list[float]:
    table = with_emulated_times(folder, table_of(*rows), manifest or manifest_of(), [])
    found: list[float] = overhead_of_rounds(table).tolist()
    return found


def test_overhead_is_what_a_round_took_beyond_its_slowest_device_as_a_share_of_that(tmp_path: Path) -> None:
    slower = row(device=1)
    faster = row(device=0, rows=2)
    assert overheads(tmp_path, faster, slower) == pytest.approx([0.10])
    assert overheads(tmp_path, slower, faster) == pytest.approx([0.10])


def test_each_round_has_its_own_overhead_and_dilation_does_not_change_it(tmp_path: Path) -> None:
    rows = [row(0, round=22, dilation=1.0), idle(0, round=22), row(1, round=300, dilation=10.0), idle(1, round=300)]
    assert overheads(tmp_path, *rows) == pytest.approx([0.10, 0.50])


@pytest.mark.parametrize("status", [Status.LATE, Status.LOST, Status.REJECTED, Status.INVALID])
def test_a_round_that_lost_a_reply_is_left_out(tmp_path: Path, status: Status) -> None:
    rows = [row(0), idle(0, status=status), row(1, round=150), idle(1)]
    assert overheads(tmp_path, *rows) == pytest.approx([0.50])


def test_a_round_in_which_nothing_is_emulated_is_left_out(tmp_path: Path) -> None:
    rows = [row(0), idle(0), idle(1, device=0), idle(1)]
    assert overheads(tmp_path, *rows, manifest=manifest_of({})) == []
    assert overheads(tmp_path, *rows, manifest=manifest_of({"b": MODEL})) == []
    assert len(overheads(tmp_path, *rows)) == 1


# --- Eq. 8 ---


def tokens_of(*tokens: tuple[int, list[int]], phase: GenerationPhase = GenerationPhase.PREFILL) -> pa.Table:
    """Rows of (prompt, devices of the pairs)."""
    devices = np.array([device for _, devices in tokens for device in devices], np.int16)
    return pa.table(
        {
            "prompt": pa.array([prompt for prompt, _ in tokens], pa.int32()),
            "phase": pa.array([int(phase)] * len(tokens), pa.uint8()),
            "device": pa.FixedSizeListArray.from_arrays(pa.array(devices), 2),
        }
    )


def channel(prompt: int, *token_s: float, policy: int = 0, factor: Sequence[float] = ()) -> dict[str, Any]:
    return {
        "kind": "channel", "policy": policy, "prompt": prompt, "token_s": list(token_s), "factor": list(factor),
    }  # fmt: skip


def test_eq_8_adds_up_every_tokens_slowest_device_under_its_prompts_channel() -> None:
    tokens = tokens_of((0, [0, 1]), (0, [0, DROPPED]), (1, [1, 0]), (0, [1, 1]), (1, [DROPPED, DROPPED]))
    events = [channel(0, 1.0, 4.0), {"kind": "scored", "prompt": 0}, channel(1, 32.0, 16.0)]
    assert eq8_sum_s(tokens, events) == 4.0 + 1.0 + 4.0 + 32.0


def test_decoded_tokens_and_prompts_without_tokens_add_nothing_to_eq_8() -> None:
    decoded = tokens_of((0, [0, 1]), phase=GenerationPhase.DECODE)
    tokens = pa.concat_tables([decoded, tokens_of((0, [0, 0]))])
    assert eq8_sum_s(tokens, [channel(0, 1.0, 4.0), channel(1, 9.0, 9.0)]) == 1.0


def test_eq_8_is_unknown_where_no_channel_was_emulated() -> None:
    assert np.isnan(eq8_sum_s(tokens_of((0, [0, 1])), [{"kind": "scored", "prompt": 0}]))


@given(
    token_s=st.lists(st.floats(1e-3, 10), min_size=3, max_size=3),
    devices=st.lists(st.lists(st.integers(DROPPED, 2), min_size=2, max_size=2), min_size=1, max_size=8),
)
def test_eq_8_is_the_sum_over_tokens_of_their_maximum(token_s: list[float], devices: list[list[int]]) -> None:
    slow = sum(max((token_s[device] for device in pair if device != DROPPED), default=0.0) for pair in devices)
    found = eq8_sum_s(tokens_of(*((0, pair) for pair in devices)), [channel(0, *token_s)])
    assert found == pytest.approx(slow)
