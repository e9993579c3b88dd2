from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from spread_columns import NAMES, spread

from bs_node.blocks import Block, Combiner, Outcome
from bs_node.dispatcher import ExchangeTimes, InProcessDispatcher
from bs_node.registry import Node
from bs_node.rows import BAND, OF_OUTCOME, OF_ROUND, Finished, RoundTimes, Rows, orphaned
from bs_node.session import Session
from testbed.latency.estimator import Estimator, Prediction
from testbed.policies.base import DROPPED, Routing, Selection, State
from testbed.policies.topk import TopK
from testbed.runlog.columns import ROUND_COLUMNS, span, token_columns
from testbed.runlog.reader import read_table
from testbed.runlog.recorder import OWN_COLUMNS, Recorder
from testbed.runlog.schema import GenerationPhase, Status

DEVICES, EXPERTS, TOKENS, WIDTH = 3, 3, 2, 4
NAN = float("nan")
OF_BAND = span(BAND, NAMES)
KEYS = {"round": 5, "policy": 0, "prompt": 1, "layer": 2, "phase": 0, "attempt": 0, "dilation": 5.0}


class Doubling:
    """A device's experts, in this process."""

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: NDArray[np.float32]) -> Any:  # noqa: ARG002
        return 2 * x_RD


class Kept:
    """Stands for a recorder: keeps a copy of every round's columns."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.tokens: list[dict[str, Any]] = []

    def record_round(self, rounds: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
        self.rounds.append(spread(rounds))
        self.tokens.append({name: np.copy(value) for name, value in tokens.items()})

    def flush(self) -> None:
        """Nothing waits."""


def routing_of(layer: int = 2, scores: bool = True) -> Routing:
    """Every token chooses experts 0 and 1, which live on the devices of the same number; device 2 has no part."""
    expert_TK = np.tile([0, 1], (TOKENS, 1))
    weight_TK = np.tile(np.float32([0.75, 0.25]), (TOKENS, 1))
    score_TE = np.full((TOKENS, EXPERTS), np.float32(0.25)) if scores else None
    return Routing(layer, expert_TK, weight_TK, np.eye(DEVICES, EXPERTS, dtype=bool), score_TE)


def state_of(first: float = 0.0) -> State:
    token_s_N, age_s_N, base_s_N, expert_s_N, row_s_N = np.arange(5 * DEVICES).reshape(5, -1) + first
    return State(token_s_N, np.array([True, True, False]), age_s_N, base_s_N, expert_s_N, row_s_N)


def block_on(device: int) -> Block:
    tokens_R = np.arange(TOKENS)
    return Block(device, tokens_R, np.full(TOKENS, device), [(device, TOKENS)])


def answered_by(device: int) -> Outcome:
    return Outcome(
        block_on(device), Status.ANSWERED, np.ones((TOKENS, WIDTH), np.float32),
        bytes_down=10, bytes_up=11, parts_down=12, parts_up=13, send_ns=14, bs_sent_ns=100, bs_received_ns=200,
        node_received_ns=10**12, node_sent_ns=10**12 + 50, node_queue_ns=15, node_dequantise_ns=16,
        node_compute_ns=17, node_padding_ns=18, node_staging_ns=21, node_quantise_ns=19, down_ns=20, up_ns=30,
        clock_offset_ns=-2_500_000_000, clock_bound_ns=25, predicted=Prediction(0.25, 0.5, 0.75),
    )  # fmt: skip


def finished(*outcomes: Outcome, routing: Routing | None = None) -> Finished:
    routing = routing or routing_of()
    selection = Selection(routing.expert_TK, routing.weight_TK)
    times = RoundTimes(1000, 1, 2, 3, ExchangeTimes(4, 5, 6, 7), last_ns=1500)
    keys = {**KEYS, "node_boot": [1, 2, 2**64 - 1]}
    asked_3N = np.arange(3.0 * DEVICES).reshape(3, DEVICES)
    return Finished(keys, routing, state_of(), selection, outcomes, routing.weight_TK, times, asked_3N)


def of(done: Finished, keep_scores: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    rounds, tokens = Rows(DEVICES, keep_scores).of(done)
    return spread(rounds), tokens


def test_every_column_that_the_log_wants_is_given() -> None:
    rounds, tokens = of(finished(answered_by(0)))
    assert rounds.keys() == {column.name for column in ROUND_COLUMNS} - OWN_COLUMNS["rounds"]
    assert tokens.keys() == {column.name for column in token_columns()} - OWN_COLUMNS["tokens"]


def test_scores_are_left_out_where_they_are_not_kept_or_the_gate_gives_none() -> None:
    assert "score" not in of(finished(), keep_scores=False)[1]
    assert "score" not in of(finished(routing=routing_of(scores=False)))[1]


def test_what_is_known_of_a_block_stands_in_its_devices_row() -> None:
    rounds, _ = of(finished(answered_by(1)))
    found = {name: rounds[name][1] for name in rounds if np.ndim(rounds[name]) and name not in OF_ROUND}
    expected = {
        "status": Status.ANSWERED, "rows": TOKENS, "experts_touched": 1,
        "bytes_down": 10, "bytes_up": 11, "parts_down": 12, "parts_up": 13, "send_ns": 14,
        "rtt_ns": 100, "bs_sent_ns": 100, "bs_received_ns": 200,
        "node_received_ns": 10**12, "node_sent_ns": 10**12 + 50, "node_queue_ns": 15, "node_dequantise_ns": 16,
        "node_compute_ns": 17, "node_padding_ns": 18, "node_staging_ns": 21, "node_quantise_ns": 19,
        "down_ns": 20, "up_ns": 30, "clock_offset_s": -2.5, "clock_bound_ns": 25,
        "predicted_compute_s": 0.25, "predicted_down_s": 0.5, "predicted_up_s": 0.75,
        "state_token_s": 1, "state_available": True, "state_age_s": 4,
        "state_base_s": 7, "state_expert_s": 10, "state_row_s": 13, "node_boot": 2,
        "bandwidth_hz": 1, "asked_down_bits_per_s": 4, "asked_up_bits_per_s": 7,
        "measured_down_bits_per_s": 80 * 5 * 1e9 / 20, "measured_up_bits_per_s": 88 * 5 * 1e9 / 30,
    }  # fmt: skip
    assert found == expected


def test_the_times_of_the_round_stand_in_every_row() -> None:
    rounds, _ = of(finished(answered_by(0)))
    expected = {
        "select_ns": 1, "group_ns": 2, "combine_ns": 3, "quantise_ns": 4, "staging_ns": -1, "wait_ns": 6,
        "dequantise_ns": 7, "round_ns": 500,
    }  # fmt: skip
    assert {name: rounds[name].tolist() for name in expected} == {name: [ns] * DEVICES for name, ns in expected.items()}


def test_copies_between_host_and_gpu_are_told_where_there_were_any() -> None:
    done = finished(answered_by(0))
    done.times.staging = SimpleNamespace(total_ns=12)  # type: ignore[assignment]
    rounds, _ = of(done)
    assert rounds["staging_ns"].tolist() == [12] * DEVICES


TIMES = OF_OUTCOME


def test_what_was_sent_nothing_has_no_times_and_counts_of_zero() -> None:
    rounds, _ = of(finished(answered_by(0)))
    assert len(TIMES) == 15
    assert {name: int(rounds[name][2]) for name in TIMES} == dict.fromkeys(TIMES, -1)
    assert np.isnan(rounds["clock_offset_s"][[1, 2]]).all()
    counts = ("status", "rows", "experts_touched", "bytes_down", "bytes_up", "parts_down", "parts_up")
    assert {name: int(rounds[name][2]) for name in counts} == dict.fromkeys(counts, 0)


def test_what_is_not_known_of_a_lost_block_is_not_0() -> None:
    rounds, _ = of(finished(Outcome(block_on(1), Status.LOST, bytes_down=10, send_ns=3, bs_sent_ns=100)))
    known = {"send_ns": 3, "bs_sent_ns": 100}
    assert {name: int(rounds[name][1]) for name in TIMES} == {**dict.fromkeys(TIMES, -1), **known}
    assert np.isnan(rounds["clock_offset_s"]).all()
    assert (int(rounds["status"][1]), int(rounds["rows"][1])) == (Status.LOST, TOKENS)


def test_nothing_is_left_of_the_round_before() -> None:
    rows = Rows(DEVICES, keep_scores=True)
    rows.of(finished(*(answered_by(device) for device in range(DEVICES))))
    rounds = spread(rows.of(finished())[0])
    for name, value in of(finished())[0].items():
        np.testing.assert_array_equal(rounds[name], value, err_msg=name)


def test_unknown_is_null_in_the_log(tmp_path: Path) -> None:
    with Recorder(tmp_path, "run", ["a", "b", "c"], top_k=2, experts=EXPERTS) as recorder:
        recorder.record_round(*of(finished(answered_by(0))))
    table = read_table(tmp_path, "rounds")
    for name in (*TIMES, "clock_offset_s"):
        assert table[name].is_null().to_pylist() == [False, True, True], name
    assert table["node_boot"].to_pylist() == [1, 2, None]
    assert table["clock_offset_s"].to_pylist() == [-2.5, None, None]
    assert table["bytes_down"].to_pylist() == [10, 0, 0]


def test_the_experts_that_were_asked_stand_beside_those_the_gate_chose() -> None:
    done, asked_TK = finished(), np.array([[2, 1], [0, 1]])
    substituted = done._replace(selection=replace(done.selection, expert_TK=asked_TK))
    for one, expected_TK in ((done, done.routing.expert_TK), (substituted, asked_TK)):
        _, tokens = of(one)
        np.testing.assert_array_equal(tokens["asked"], expected_TK)
        np.testing.assert_array_equal(tokens["expert"], done.routing.expert_TK)


def test_without_a_band_nothing_is_said_of_rates() -> None:
    rounds, _ = of(finished(answered_by(0))._replace(asked_3N=None))
    assert not set(OF_BAND) & rounds.keys()


@pytest.mark.parametrize("changed", [{"down_ns": None}, {"down_ns": 0}])
def test_a_rate_that_was_not_measured_is_unknown(changed: dict[str, Any]) -> None:
    rounds, _ = of(finished(replace(answered_by(0), **changed)))
    assert np.isnan(rounds["measured_down_bits_per_s"]).all()
    assert np.isnan(rounds["measured_up_bits_per_s"]).tolist() == [False, True, True]


def test_a_rate_is_that_of_the_emulated_world(tmp_path: Path) -> None:
    with Recorder(tmp_path, "run", ["a", "b", "c"], top_k=2, experts=EXPERTS) as recorder:
        for dilation in (1.0, 5.0):
            done = finished(answered_by(0))
            recorder.record_round(*of(done._replace(keys={**done.keys, "dilation": dilation})))
    table = read_table(tmp_path, "rounds")
    assert table["measured_down_bits_per_s"].to_pylist() == pytest.approx([4e9, None, None, 2e10, None, None])
    assert table["bandwidth_hz"].to_pylist() == [0, 1, 2] * 2


def test_a_token_of_which_nothing_arrived_is_orphaned_unless_the_gate_gave_it_no_expert() -> None:
    expert_TK = np.array([[0, 1], [0, EXPERTS], [EXPERTS, EXPERTS], [1, 2]])
    routing = Routing(0, expert_TK, np.ones((4, 2), np.float32), np.eye(DEVICES, EXPERTS, dtype=bool))
    arrived_TK = np.array([[False, False], [False, False], [False, False], [True, False]])
    assert orphaned(routing, arrived_TK).tolist() == [True, True, False, False]


# --- in a session: rows are written only when the next round has been sent ---


def session_of(recorder: Any, boots: Sequence[int | None] = (7, None, 9)) -> Session:
    nodes = [Node(n, f"jetson-{n}", routing_id=b"x", boot_id=boot) for n, boot in enumerate(boots)]
    dispatcher = InProcessDispatcher([Doubling()] * DEVICES)
    return Session(TopK(), dispatcher, Estimator(DEVICES, 100, 100), nodes, recorder=recorder)


def play(session: Session, layer: int = 2) -> NDArray[np.float32]:
    """A round as the experts' function has it, without torch."""
    routing, times = routing_of(layer), RoundTimes(0)
    state = session.state()
    selection = session.select(routing, state)
    times.selected()
    blocks = session.group(routing, selection)
    times.grouped()
    hidden_TD = np.ones((TOKENS, WIDTH), np.float32)
    combiner = Combiner(blocks, selection.weight_TK, lambda: np.zeros_like(hidden_TD))
    outcomes, exchange_times = session.exchange(routing, state, selection, hidden_TD, combiner)
    times.exchanged(exchange_times)
    times.combined(combiner.spent_ns)
    session.finish(routing, state, selection, outcomes, selection.weight_TK, times)
    return combiner.out_TD


@pytest.mark.parametrize(("quick_ns", "written_by_the_next"), [(-1, 1), (10**15, 0)], ids=["at once", "together"])
def test_a_rounds_rows_are_its_own_whatever_changes_before_they_are_written(
    quick_ns: int, written_by_the_next: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bs_node.session.QUICK_NS", quick_ns)
    kept = Kept()
    session = session_of(kept)
    session.policy_index, session.prompt, session.dispatcher.dilation = 1, 4, 5.0
    assert (play(session, layer=2) == 2).all()
    assert kept.rounds == []
    session.policy_index, session.prompt, session.dispatcher.dilation = 2, 9, 10.0
    session.phase = GenerationPhase.DECODE
    play(session, layer=3)  # may write the first while its own blocks are computed
    assert len(kept.rounds) == written_by_the_next
    session.policy_index, session.prompt = 3, 11
    session.settle()
    session.settle()
    keys = ("round", "policy", "prompt", "layer", "phase", "dilation")
    assert [tuple(rounds[key] for key in keys) for rounds in kept.rounds] == [
        (0, 1, 4, 2, GenerationPhase.PREFILL, 5.0),
        (1, 2, 9, 3, GenerationPhase.DECODE, 10.0),
    ]


def test_a_session_gives_every_column_that_the_log_wants() -> None:
    kept = Kept()
    session = session_of(kept)
    play(session)
    session.settle()
    (rounds,), (tokens,) = kept.rounds, kept.tokens
    assert rounds.keys() == {column.name for column in ROUND_COLUMNS} - OWN_COLUMNS["rounds"] - set(OF_BAND)
    assert tokens.keys() == {column.name for column in token_columns()} - OWN_COLUMNS["tokens"]
    assert rounds["status"].tolist() == [Status.ANSWERED, Status.ANSWERED, Status.IDLE]
    assert tokens["kept"].all()
    assert (tokens["device"] != DROPPED).all()


def test_the_log_takes_a_sessions_rounds(tmp_path: Path) -> None:
    with Recorder(tmp_path, "run", ["a", "b", "c"], top_k=2, experts=EXPERTS) as recorder:
        session = session_of(recorder)
        for layer in range(3):
            play(session, layer)
        session.settle()
    rounds, tokens = read_table(tmp_path, "rounds"), read_table(tmp_path, "tokens")
    assert rounds["layer"].to_pylist() == [layer for layer in range(3) for _ in range(DEVICES)]
    assert rounds["node_boot"].to_pylist() == [7, None, 9] * 3
    assert rounds["rtt_ns"].null_count == 3 * DEVICES  # in this process there is no wire
    assert rounds["state_token_s"].null_count == 3 * DEVICES  # and so nothing to learn from
    assert tokens.num_rows == 3 * TOKENS
    assert (rounds["round_ns"].to_numpy() > 0).all()


def test_nothing_is_written_where_no_log_is_kept() -> None:
    session = session_of(None)
    play(session)
    session.settle()
    assert session.rounds == 1


@pytest.mark.parametrize("away", range(DEVICES))
def test_a_policy_sees_who_is_there(away: int) -> None:
    session = session_of(None)
    session._nodes[away].routing_id = None
    assert session.state().available_N.tolist() == [device != away for device in range(DEVICES)]
