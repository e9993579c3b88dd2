"""What a run's rounds share: the policy in force, the estimates, the log, and where in the workload we are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

import numpy as np

from bs_node.blocks import Outcome
from bs_node.dispatcher import Dispatcher, ExchangeTimes
from bs_node.registry import Node
from testbed.errors import ConfigError, OrphanedTokensError
from testbed.latency.running_mean import RunningMean
from testbed.policies.base import DROPPED, BoolArray, FloatArray, Policy, Routing, Selection, State
from testbed.policies.selection import routed
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

FLUSH_EVERY_NS = 1_000_000_000


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

    def combined(self) -> None:
        self.combine_ns = self._lap()

    def _lap(self) -> int:
        before_ns, self.last_ns = self.last_ns, monotonic_ns()
        return self.last_ns - before_ns

    @property
    def round_ns(self) -> int:
        return self.last_ns - self.started_ns


class Session:
    """State of a run between rounds. The runner sets `policy`, `prompt` and `phase`; rounds read them.

    `recorder` is None where nothing is to be logged (parity tests).
    """

    def __init__(
        self,
        policy: Policy,
        dispatcher: Dispatcher,
        estimator: RunningMean,
        nodes: Sequence[Node],
        *,
        recorder: Recorder | None = None,
        keep_scores: bool = True,
        fail_on_orphans: bool = False,
    ) -> None:
        self.policy, self.dispatcher = policy, dispatcher
        self.policy_index, self.prompt, self.phase = 0, 0, GenerationPhase.PREFILL
        self.rounds = 0
        self.on_round: Callable[[], None] = lambda: None  # progress
        self._estimator, self._nodes, self._recorder = estimator, nodes, recorder
        self._keep_scores, self._fail_on_orphans = keep_scores, fail_on_orphans
        self._columns = DeviceColumns(len(nodes))
        self._flushed_ns = monotonic_ns()

    def state(self) -> State:
        """What the policy may know now."""
        self.dispatcher.refresh()
        available_N = np.array([node.available for node in self._nodes])
        return self._estimator.state(self.phase, available_N, monotonic_ns() / 1e9)

    def select(self, routing: Routing, state: State) -> Selection:
        """The policy's answer, once it is one that can be carried out. Raises ConfigError, naming the policy."""
        selection = self.policy.select(routing, state)
        device_TK, weight_TK = selection.device_TK, selection.weight_TK
        if device_TK.shape != routing.expert_TK.shape or weight_TK.shape != routing.expert_TK.shape:
            raise ConfigError(f"policy {self.policy.name}: answers must have the shape of expert_TK")
        if device_TK.size and not DROPPED <= device_TK.min() <= device_TK.max() < len(self._nodes):
            raise ConfigError(f"policy {self.policy.name}: a device is below {DROPPED} or not below {len(self._nodes)}")
        return selection

    def finish(
        self,
        routing: Routing,
        state: State,
        selection: Selection,
        outcomes: Sequence[Outcome],
        arrived_TK: BoolArray,
        final_TK: FloatArray,
        times: RoundTimes,
    ) -> None:
        """Learn from a round and log it. Raises OrphanedTokensError where the run file asks for that."""
        now_s = monotonic_ns() / 1e9
        for outcome in outcomes:
            rtt_ns = outcome.rtt_ns
            if outcome.status is Status.ANSWERED and rtt_ns is not None:
                self._estimator.teach(outcome.block.device, self.phase, outcome.block.rows, rtt_ns / 1e9, now_s)
        orphaned_T = ~arrived_TK.any(axis=1) & routed(routing).any(axis=1)
        if self._recorder is not None:
            tokens = {
                "expert": routing.expert_TK,
                "weight": routing.weight_TK,
                "kept": arrived_TK,
                "device": selection.device_TK,
                "final_weight": final_TK,
                "orphaned": orphaned_T,
            }
            if self._keep_scores and routing.score_TE is not None:
                tokens["score"] = routing.score_TE
            self._recorder.record_round(self._round_columns(routing, state, outcomes, times), tokens)
            self._flush()
        self.rounds += 1
        self.on_round()
        if self._fail_on_orphans and orphaned_T.any():
            raise OrphanedTokensError(
                f"round {self.rounds - 1}, layer {routing.layer}: {int(orphaned_T.sum())} tokens lost all their "
                'experts: see events.jsonl for the nodes, or set [on_loss] orphaned = "zero"'
            )

    def _round_columns(
        self, routing: Routing, state: State, outcomes: Sequence[Outcome], times: RoundTimes
    ) -> dict[str, Any]:
        exchange = times.exchange
        return {
            "round": self.rounds,
            "policy": self.policy_index,
            "prompt": self.prompt,
            "layer": routing.layer,
            "phase": int(self.phase),
            "attempt": 0,
            "node_boot": [2**64 - 1 if node.boot_id is None else node.boot_id for node in self._nodes],
            "select_ns": times.select_ns,
            "group_ns": times.group_ns,
            "quantise_ns": exchange.quantise_ns,
            "wait_ns": exchange.wait_ns,
            "dequantise_ns": exchange.dequantise_ns,
            "combine_ns": times.combine_ns,
            "round_ns": times.round_ns,
            "state_token_s": state.token_s_N,
            "state_available": state.available_N,
            "state_age_s": state.age_s_N,
            "state_base_s": state.base_s_N,
            "state_expert_s": state.expert_s_N,
            "state_row_s": state.row_s_N,
            **self._columns.fill(outcomes),
        }

    def _flush(self) -> None:
        """At most a second of rows is lost at a power cut; none at a kill."""
        if self._recorder is not None and monotonic_ns() - self._flushed_ns > FLUSH_EVERY_NS:
            self._recorder.flush()
            self._flushed_ns = monotonic_ns()


class DeviceColumns:
    """The columns of a round that differ from device to device, in arrays kept from round to round."""

    COUNTS = ("rows", "experts_touched", "bytes_down", "bytes_up", "parts_down", "parts_up")
    DURATIONS = (
        "send_ns", "rtt_ns", "bs_sent_ns", "bs_received_ns", "node_received_ns", "node_sent_ns", "node_queue_ns",
        "node_dequantise_ns", "node_compute_ns", "node_padding_ns", "node_quantise_ns",
    )  # fmt: skip

    def __init__(self, devices: int) -> None:
        self._arrays = {name: np.zeros(devices, np.int64) for name in (*self.COUNTS, *self.DURATIONS, "status")}

    def fill(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Column by column, zero or unknown for the devices that were sent nothing."""
        arrays = self._arrays
        for name, array in arrays.items():
            array[:] = -1 if name in self.DURATIONS else 0
        for outcome in outcomes:
            device = outcome.block.device
            for name, value in self._values(outcome):
                arrays[name][device] = -1 if value is None else value
        return arrays

    def _values(self, outcome: Outcome) -> list[tuple[str, int | None]]:
        block = outcome.block
        compute_ns = outcome.node_compute_ns
        if compute_ns is not None and outcome.node_padding_ns is not None:
            compute_ns += outcome.node_padding_ns
        return [
            ("status", outcome.status),
            ("rows", block.rows),
            ("experts_touched", len(block.segments)),
            ("bytes_down", outcome.bytes_down),
            ("bytes_up", outcome.bytes_up),
            ("parts_down", outcome.parts_down),
            ("parts_up", outcome.parts_up),
            ("send_ns", outcome.send_ns),
            ("rtt_ns", outcome.rtt_ns),
            ("bs_sent_ns", outcome.sent_ns),
            ("bs_received_ns", outcome.received_ns),
            ("node_received_ns", outcome.node_received_ns),
            ("node_sent_ns", outcome.node_sent_ns),
            ("node_queue_ns", outcome.node_queue_ns),
            ("node_dequantise_ns", outcome.node_dequantise_ns),
            ("node_compute_ns", compute_ns),
            ("node_padding_ns", outcome.node_padding_ns),
            ("node_quantise_ns", outcome.node_quantise_ns),
        ]
