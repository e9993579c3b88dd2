"""What a finished round becomes in the log: one row per device, one per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from operator import attrgetter
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bs_node.blocks import NOT_STAGED, Outcome, arrived
from bs_node.dispatcher import ExchangeTimes
from bs_node.tables import table
from testbed.policies.base import BoolArray, FloatArray, Routing, Selection, State
from testbed.policies.selection import routed

if TYPE_CHECKING:
    from bs_node.gpu_rows import Staging

# Columns that lie side by side in the log travel there together: a round is written in a dozen moves.
TIMES, SECONDS, BAND = "select_ns:clock_bound_ns", "clock_offset_s:state_row_s", "bandwidth_hz:measured_up_bits_per_s"
OF_ROUND = (
    "select_ns",
    "group_ns",
    "quantise_ns",
    "staging_ns",
    "wait_ns",
    "dequantise_ns",
    "combine_ns",
    "round_ns",
)
OF_OUTCOME = (  # fields of an outcome that are columns
    "send_ns",
    "rtt_ns",
    "bs_sent_ns",
    "bs_received_ns",
    "node_received_ns",
    "node_sent_ns",
    "node_queue_ns",
    "node_dequantise_ns",
    "node_compute_ns",
    "node_padding_ns",
    "node_staging_ns",
    "node_quantise_ns",
    "down_ns",
    "up_ns",
    "clock_bound_ns",
)  # fmt: skip
COUNTS = ("rows", "experts_touched:parts_up", "bytes_down:bytes_up", "status")
UNKNOWN_TIME, NOTHING_SENT = -1, (0,) * 7
UNPREDICTED = (nan, nan, nan)


@dataclass(slots=True)
class RoundTimes:
    """Stamps of one round, in nanoseconds on the base station's monotonic clock."""

    started_ns: int
    select_ns: int = 0
    group_ns: int = 0
    combine_ns: int = 0
    exchange: ExchangeTimes = field(default_factory=ExchangeTimes)
    last_ns: int = 0
    staging: Staging | None = None  # of a model on a GPU

    def selected(self) -> None:
        self.last_ns = monotonic_ns()
        self.select_ns = self.last_ns - self.started_ns

    def grouped(self) -> None:
        self.group_ns = self._lap()

    def exchanged(self, exchange: ExchangeTimes) -> None:
        self.exchange = exchange
        self._lap()

    def combined(self, while_waiting_ns: int) -> None:
        self.combine_ns = while_waiting_ns + self._lap()

    def _lap(self) -> int:
        before_ns, self.last_ns = self.last_ns, monotonic_ns()
        return self.last_ns - before_ns

    @property
    def round_ns(self) -> int:
        return self.last_ns - self.started_ns

    def of_round(self) -> tuple[int, ...]:
        """In the order of OF_ROUND."""
        exchange, staging_ns = self.exchange, NOT_STAGED if self.staging is None else self.staging.total_ns
        return (
            self.select_ns, self.group_ns, exchange.quantise_ns, staging_ns, exchange.wait_ns, exchange.dequantise_ns,
            self.combine_ns, self.round_ns,
        )  # fmt: skip


class Finished(NamedTuple):
    """A round whose rows are still to be written."""

    keys: dict[str, Any]
    routing: Routing
    state: State
    selection: Selection
    outcomes: Sequence[Outcome]
    final_TK: FloatArray
    times: RoundTimes
    asked_3N: FloatArray | None = None  # Hz, bit/s down, bit/s up


def orphaned(routing: Routing, arrived_TK: BoolArray) -> BoolArray:
    """orphaned_T: tokens that the gate gave experts, of which none answered."""
    if arrived_TK.all():
        return np.zeros(len(arrived_TK), bool)
    return np.asarray(~arrived_TK.any(axis=1) & routed(routing).any(axis=1))


class Rows:
    """Turns rounds into columns, in tables kept from round to round.

    D devices; C columns of one kind: counts of what was sent, times in ns, seconds, facts of the band.
    """

    def __init__(self, devices: int, keep_scores: bool) -> None:
        self._keep_scores = keep_scores
        self._count_DC = np.empty((devices, len(NOTHING_SENT)), np.int64)
        self._time_DC = np.empty((devices, len(OF_ROUND) + len(OF_OUTCOME)), np.int64)
        self._second_DC = np.empty((devices, 9))
        self._band_DC = np.empty((devices, 5))
        count_DC = self._count_DC
        self._columns: dict[str, Any] = {
            **dict(zip(COUNTS, (count_DC[:, 0], count_DC[:, 1:4], count_DC[:, 4:6], count_DC[:, 6]), strict=True)),
            TIMES: self._time_DC,
            SECONDS: self._second_DC,
        }

    def of(self, done: Finished) -> tuple[dict[str, Any], dict[str, Any]]:
        """Columns of the tables `rounds` and `tokens`, valid until the next call."""
        arrived_TK = arrived(done.outcomes, done.selection.device_TK)
        tokens = {
            "expert": done.routing.expert_TK,
            "weight": done.routing.weight_TK,
            "asked": done.routing.expert_TK if done.selection.expert_TK is None else done.selection.expert_TK,
            "kept": arrived_TK,
            "device": done.selection.device_TK,
            "final_weight": done.final_TK,
            "orphaned": orphaned(done.routing, arrived_TK),
        }
        if self._keep_scores and done.routing.score_TE is not None:
            tokens["score"] = done.routing.score_TE
        self._time_DC[:, : len(OF_ROUND)] = done.times.of_round()
        self._fill(done.outcomes)
        self._fill_state(done.state)
        rounds = {**done.keys, "state_available": done.state.available_N, **self._columns}
        if done.asked_3N is not None:
            rounds[BAND] = self._fill_band(done.asked_3N, done.keys["dilation"])
        return rounds, tokens

    def _fill_state(self, state: State) -> None:
        """What the policy saw."""
        seen = (state.token_s_N, state.age_s_N, state.base_s_N, state.expert_s_N, state.row_s_N)
        for column, seconds_N in enumerate(seen, start=4):
            self._second_DC[:, column] = seconds_N

    def _fill_band(self, asked_3N: FloatArray, dilation: float) -> FloatArray:
        """What was asked for, and the rates that came of it in emulated time; NaN where nothing travelled."""
        self._band_DC[:, :3] = asked_3N.T
        air_ns_D2, bits_D2 = self._time_DC[:, AIR], 8.0 * self._columns["bytes_down:bytes_up"]
        self._band_DC[:, 3:] = nan
        np.divide(bits_D2 * dilation * 1e9, air_ns_D2, out=self._band_DC[:, 3:], where=air_ns_D2 > 0)
        return self._band_DC

    def _fill(self, outcomes: Sequence[Outcome]) -> None:
        """Zero, or unknown for a time, for the devices that were sent nothing."""
        self._count_DC[:] = 0
        self._time_DC[:, len(OF_ROUND) :] = UNKNOWN_TIME
        self._second_DC[:, :4] = nan
        if not outcomes:
            return
        device_B = np.array([outcome.block.device for outcome in outcomes])
        counts = [(o.block.rows, len(o.block.segments), *_OUTCOME_COUNTS(o)) for o in outcomes]
        self._count_DC[device_B] = table(counts, np.int64)
        times = [_OUTCOME_TIMES(o) for o in outcomes]
        try:
            time_BC = table(times, np.int64)
        except TypeError:  # something is unknown
            time_BC = table([[UNKNOWN_TIME if ns is None else ns for ns in row] for row in times], np.int64)
        self._time_DC[device_B, len(OF_ROUND) :] = time_BC
        seconds = [(_in_seconds(o.clock_offset_ns), *(o.predicted or UNPREDICTED)) for o in outcomes]
        self._second_DC[device_B, :4] = table(seconds, np.float64)


def _in_seconds(time_ns: int | None) -> float:
    return nan if time_ns is None else time_ns / 1e9


_OUTCOME_COUNTS = attrgetter("parts_down", "parts_up", "bytes_down", "bytes_up", "status")
_OUTCOME_TIMES = attrgetter(*OF_OUTCOME)
AIR = [len(OF_ROUND) + OF_OUTCOME.index(name) for name in ("down_ns", "up_ns")]
