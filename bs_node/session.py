"""What a run's rounds share: the policy in force, the estimates, the log, and where in the workload we are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic_ns

import numpy as np

from bs_node.blocks import Block, Outcome, group
from bs_node.dispatcher import Dispatcher
from bs_node.registry import Node
from bs_node.rows import Finished, RoundTimes, Rows, orphaned
from testbed.errors import ConfigError, OrphanedTokensError
from testbed.latency.running_mean import RunningMean
from testbed.policies.base import BoolArray, FloatArray, Policy, Routing, Selection, State
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

FLUSH_EVERY_NS = 1_000_000_000


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
        self._fail_on_orphans = fail_on_orphans
        self._rows = Rows(len(nodes), keep_scores)
        self._flushed_ns = monotonic_ns()
        self._unwritten: Finished | None = None

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
        return selection

    def group(self, routing: Routing, selection: Selection) -> list[Block]:
        """The blocks that the policy asks for. Raises ConfigError, naming the policy, where that is not possible."""
        try:
            return group(routing.expert_TK, selection.device_TK, *routing.holds_NE.shape)
        except ValueError as error:
            raise ConfigError(f"policy {self.policy.name}: {error}") from None

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
        """Learn from a round and keep it for the log. Raises OrphanedTokensError where the run file asks for that."""
        now_s = monotonic_ns() / 1e9
        for outcome in outcomes:
            rtt_ns = outcome.rtt_ns
            if outcome.status is Status.ANSWERED and rtt_ns is not None:
                self._estimator.teach(outcome.block.device, self.phase, outcome.block.rows, rtt_ns / 1e9, now_s)
        if self._recorder is not None:
            keys = {
                "round": self.rounds,
                "policy": self.policy_index,
                "prompt": self.prompt,
                "layer": routing.layer,
                "phase": int(self.phase),
                "attempt": 0,
                "node_boot": [2**64 - 1 if node.boot_id is None else node.boot_id for node in self._nodes],
            }
            self._unwritten = Finished(keys, routing, state, selection, outcomes, arrived_TK, final_TK, times)
        self.rounds += 1
        self.on_round()
        if self._fail_on_orphans and (lost := int(orphaned(routing, arrived_TK).sum())):
            raise OrphanedTokensError(
                f"round {self.rounds - 1}, layer {routing.layer}: {lost} tokens lost all their "
                'experts: see events.jsonl for the nodes, or set [on_loss] orphaned = "zero"'
            )

    def settle(self) -> None:
        """Write the last round's rows. A round calls it once it has sent its own: the nodes work meanwhile."""
        if self._recorder is None or self._unwritten is None:
            return
        done, self._unwritten = self._unwritten, None
        self._recorder.record_round(*self._rows.of(done))
        self._flush()

    def _flush(self) -> None:
        """At most a second of rows is lost at a power cut; none at a kill."""
        if self._recorder is not None and monotonic_ns() - self._flushed_ns > FLUSH_EVERY_NS:
            self._recorder.flush()
            self._flushed_ns = monotonic_ns()
