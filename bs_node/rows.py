"""What a finished round becomes in the log: one row per device, one per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import nan
from operator import attrgetter
from time import monotonic_ns
from typing import Any, NamedTuple

import numpy as np

from bs_node.blocks import Outcome
from bs_node.dispatcher import ExchangeTimes
from testbed.policies.base import BoolArray, FloatArray, Routing, Selection, State
from testbed.policies.selection import routed

# An outcome's fields that are columns.
OF_OUTCOME = (
    "bytes_down",
    "bytes_up",
    "parts_down",
    "parts_up",
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
    "node_quantise_ns",
    "down_ns",
    "up_ns",
    "clock_bound_ns",
)  # fmt: skip


UNPREDICTED = (nan, nan, nan)
ASKED = ("bandwidth_hz", "asked_down_bits_per_s", "asked_up_bits_per_s")
MEASURED = {"measured_down_bits_per_s": "down", "measured_up_bits_per_s": "up"}
IN_SECONDS = ("clock_offset_s", "predicted_compute_s", "predicted_down_s", "predicted_up_s")


@dataclass(slots=True)
class RoundTimes:
    """Stamps of one round, in nanoseconds on the base station's monotonic clock."""

    started_ns: int
    select_ns: int = 0
    group_ns: int = 0
    combine_ns: int = 0
    exchange: ExchangeTimes = field(default_factory=ExchangeTimes)
    last_ns: int = 0

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

    def columns(self) -> dict[str, int]:
        return {
            "select_ns": self.select_ns,
            "group_ns": self.group_ns,
            "quantise_ns": self.exchange.quantise_ns,
            "wait_ns": self.exchange.wait_ns,
            "dequantise_ns": self.exchange.dequantise_ns,
            "combine_ns": self.combine_ns,
            "round_ns": self.round_ns,
        }


class Finished(NamedTuple):
    """A round whose rows are still to be written."""

    keys: dict[str, Any]
    routing: Routing
    state: State
    selection: Selection
    outcomes: Sequence[Outcome]
    arrived_TK: BoolArray
    final_TK: FloatArray
    times: RoundTimes
    asked_3N: FloatArray | None = None  # Hz, bit/s down, bit/s up


def orphaned(routing: Routing, arrived_TK: BoolArray) -> BoolArray:
    """orphaned_T: tokens that the gate gave experts, of which none answered."""
    if arrived_TK.all():
        return np.zeros(len(arrived_TK), bool)
    return np.asarray(~arrived_TK.any(axis=1) & routed(routing).any(axis=1))


def state_columns(state: State) -> dict[str, FloatArray | BoolArray]:
    """What the policy saw."""
    return {
        "state_token_s": state.token_s_N,
        "state_available": state.available_N,
        "state_age_s": state.age_s_N,
        "state_base_s": state.base_s_N,
        "state_expert_s": state.expert_s_N,
        "state_row_s": state.row_s_N,
    }


class Rows:
    """Turns rounds into columns, in a table kept from round to round."""

    def __init__(self, devices: int, keep_scores: bool) -> None:
        names = ("status", "rows", "experts_touched", *OF_OUTCOME)
        self._keep_scores = keep_scores
        self._nothing_C = np.array([-1 if name.endswith("_ns") else 0 for name in names], np.int64)
        self._table_DC = np.empty((devices, len(names)), np.int64)
        self._seconds_CD = np.empty((len(IN_SECONDS), devices))
        self._column_of: dict[str, Any] = {name: self._table_DC[:, place] for place, name in enumerate(names)}
        self._column_of |= dict(zip(IN_SECONDS, self._seconds_CD, strict=True))

    def of(self, done: Finished) -> tuple[dict[str, Any], dict[str, Any]]:
        """Columns of the tables `rounds` and `tokens`, valid until the next call."""
        tokens = {
            "expert": done.routing.expert_TK,
            "weight": done.routing.weight_TK,
            "asked": done.routing.expert_TK if done.selection.expert_TK is None else done.selection.expert_TK,
            "kept": done.arrived_TK,
            "device": done.selection.device_TK,
            "final_weight": done.final_TK,
            "orphaned": orphaned(done.routing, done.arrived_TK),
        }
        if self._keep_scores and done.routing.score_TE is not None:
            tokens["score"] = done.routing.score_TE
        self._fill(done.outcomes)
        rounds = {**done.keys, **done.times.columns(), **state_columns(done.state), **self._column_of}
        if done.asked_3N is not None:
            rounds |= zip(ASKED, done.asked_3N, strict=True)
            rounds |= {name: self._rate(way, done.keys["dilation"]) for name, way in MEASURED.items()}
        return rounds, tokens

    def _rate(self, way: str, dilation: float) -> FloatArray:
        air_ns_N, bits_N = self._column_of[f"{way}_ns"], 8.0 * self._column_of[f"bytes_{way}"]
        rate_N: FloatArray = np.full(len(bits_N), nan)
        np.divide(bits_N * dilation * 1e9, air_ns_N, out=rate_N, where=air_ns_N > 0)
        return rate_N

    def _fill(self, outcomes: Sequence[Outcome]) -> None:
        """Zero, or unknown for a time, for the devices that were sent nothing."""
        self._table_DC[:] = self._nothing_C
        self._seconds_CD[:] = np.nan
        if not outcomes:
            return
        device_B = [outcome.block.device for outcome in outcomes]
        values = [(o.status, o.block.rows, len(o.block.segments), *_OUTCOME_VALUES(o)) for o in outcomes]
        try:
            table_B = np.fromiter(chain.from_iterable(values), np.int64, len(values) * self._table_DC.shape[1])
        except TypeError:  # something is unknown
            known = (-1 if value is None else value for value in chain.from_iterable(values))
            table_B = np.fromiter(known, np.int64, len(values) * self._table_DC.shape[1])
        self._table_DC[device_B] = table_B.reshape(len(values), -1)
        seconds = [(_in_seconds(o.clock_offset_ns), *(o.predicted or UNPREDICTED)) for o in outcomes]
        self._seconds_CD[:, device_B] = np.array(seconds).T


def _in_seconds(time_ns: int | None) -> float:
    return nan if time_ns is None else time_ns / 1e9


_OUTCOME_VALUES = attrgetter(*OF_OUTCOME)
