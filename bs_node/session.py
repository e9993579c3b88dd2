"""What a run's rounds share: the policy in force, the estimates, the log, and where in the workload we are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic_ns

import numpy as np

from bs_node.band import Band, BandPlan
from bs_node.blocks import Block, Combiner, Outcome, arrived, group
from bs_node.dispatcher import Dispatcher, ExchangeTimes, Hidden, Watcher
from bs_node.learning import Estimates, Learning
from bs_node.probing import Prober
from bs_node.registry import Node
from bs_node.round import EarlyEnd
from bs_node.rows import Finished, RoundTimes, Rows, orphaned
from testbed.errors import ConfigError, OrphanedTokensError
from testbed.policies.base import FloatArray, Policy, Routing, Selection, State
from testbed.policies.selection import dropped_share
from testbed.policies.steering import Steered
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

QUICK_NS = 5_000_000  # so long lessons and rows of quick rounds may wait: many at once cost half as much
SHARES_SUM_WITHIN = 1e-6
ROWS_AT_JOIN = (1, 8)  # two sizes: one alone cannot tell a block's cost from its rows'


class Session:
    """State of a run between rounds. The runner sets `policy`, `prompt` and `phase`; rounds read them.

    `recorder` is None where nothing is to be logged (parity tests).
    """

    def __init__(
        self,
        policy: Policy,
        dispatcher: Dispatcher,
        estimates: Estimates,
        nodes: Sequence[Node],
        *,
        recorder: Recorder | None = None,
        keep_scores: bool = True,
        fail_on_orphans: bool = False,
        probe_after_s: float | None = None,
        band: Band | None = None,
    ) -> None:
        """`band` is None where there is nothing to share out."""
        self.band, self.plan = band, BandPlan()
        self.policy, self.dispatcher = policy, dispatcher
        self.policy_index, self.prompt, self.phase = 0, 0, GenerationPhase.PREFILL
        self.rounds = 0
        self.on_round: Callable[[], None] = lambda: None  # progress
        self._learning, self._nodes, self._recorder = Learning(estimates, nodes), nodes, recorder
        self._fail_on_orphans, self._probe_after_s = fail_on_orphans, probe_after_s
        self._rows = Rows(len(nodes), keep_scores)
        self._unwritten: list[Finished] = []
        self._still_to_learn: list[Outcome] = []
        self._settle_ns = 0  # when to, on the monotonic clock

    def state(self) -> State:
        """What the policy may know now."""
        self.dispatcher.refresh()
        self._learning.answered(self.dispatcher.collect_late())
        available_N = np.array([node.available for node in self._nodes])
        state = self._learning.state(self.phase, available_N)
        if self.band is None:
            return state
        measured_s_WN = self._learning.estimates.air_row_s_WN()
        air = self.band.air(measured_s_WN)
        longer_s_N = (air.row_s_WN - measured_s_WN).sum(axis=0)  # where the links' state is told, not measured
        return replace(state, air=air, row_s_N=state.row_s_N + longer_s_N, token_s_N=state.token_s_N + longer_s_N)

    def exchange(
        self, routing: Routing, state: State, selection: Selection, hidden_TD: Hidden, combiner: Combiner
    ) -> tuple[list[Outcome], ExchangeTimes]:
        """Have the blocks computed; add up, learn, and write the round before, while replies still come."""

        def answered(outcome: Outcome) -> None:
            combiner.take(outcome)
            if (outcome.rtt_ns or 0) > QUICK_NS:
                self._learning.answered([outcome])
            else:
                self._still_to_learn.append(outcome)

        blocks, early_end = combiner.blocks, None
        self._share_band(blocks, state, selection)
        if selection.deadline is not None:
            early_end = EarlyEnd(selection.deadline, self.dispatcher.dilation, blocks, len(hidden_TD))
        if self._probe_after_s is not None:
            self._probe_the_unused(routing, state, blocks, hidden_TD.shape[1], self._probe_after_s)

        def sent() -> None:
            combiner.prepare()
            if monotonic_ns() >= self._settle_ns:
                self.settle()

        watcher = Watcher(sent, answered)
        return self.dispatcher.exchange(
            self.rounds, routing.layer, hidden_TD, blocks, watcher=watcher, early_end=early_end
        )

    def begin_prompt(self, prompt: int, dilation: float) -> None:
        """Channel and nodes are those of this prompt from now on, and the band is shared evenly."""
        self.prompt, self.phase, self.dispatcher.dilation = prompt, GenerationPhase.PREFILL, dilation
        if self.band is not None:
            self.band.give(None)
            self.dispatcher.air_ratio_WN = None

    def _share_band(self, blocks: Sequence[Block], state: State, selection: Selection) -> None:
        """As the policy decided, or as the plan says."""
        if self.band is None or state.air is None:
            return
        share_N = selection.bandwidth_share_N
        self.band.give(self.plan.share_N(blocks, state, self.prompt) if share_N is None else share_N)
        self.dispatcher.air_ratio_WN = self.band.air_ratio_WN(state.air)

    def probe_at_join(self, prober: Prober) -> None:
        """A first idea of every device that is there: one row, then a few."""
        there = [node.index for node in self._nodes if node.available]
        for outcomes in prober.sweep(there, ROWS_AT_JOIN, repeats=1):
            for outcome in outcomes:
                self._learn(outcome)

    def _learn(self, outcome: Outcome) -> None:
        if outcome.status is Status.ANSWERED:
            self._learning.answered([outcome])
        else:
            self._learning.missed(outcome)

    def _probe_the_unused(
        self, routing: Routing, state: State, blocks: Sequence[Block], width: int, probe_after_s: float
    ) -> None:
        """A device that the policy avoids would never show that it has recovered: ask it for a row now and then."""
        asked = {block.device for block in blocks}
        useful_N = np.asarray(routing.holds_NE.any(axis=1))
        for device, node in enumerate(self._nodes):
            recent = state.age_s_N[device] < probe_after_s  # False where it was never measured
            if node.available and useful_N[device] and device not in asked and not recent:
                self.dispatcher.probe(device, routing.layer, int(routing.holds_NE[device].argmax()), width)

    def select(self, routing: Routing, state: State) -> Selection:
        """The policy's answer, once it is one that can be carried out. Raises ConfigError, naming the policy."""
        if isinstance(self.policy, Steered):
            self.policy.begin(int(self.phase))
        selection = self.policy.select(routing, state)
        shape, other_TK = routing.expert_TK.shape, selection.expert_TK
        shaped = selection.device_TK.shape == selection.weight_TK.shape == shape
        if not shaped or (other_TK is not None and other_TK.shape != shape):
            raise ConfigError(f"policy {self.policy.name}: answers must have the shape of expert_TK")
        share_N, devices = selection.bandwidth_share_N, len(self._nodes)
        if share_N is not None and not (
            share_N.shape == (devices,) and (share_N >= 0).all() and abs(share_N.sum() - 1) < SHARES_SUM_WITHIN
        ):
            raise ConfigError(
                f"policy {self.policy.name}: bandwidth shares must be {devices} numbers >= 0 summing to 1"
            )
        return selection

    def group(self, routing: Routing, selection: Selection) -> list[Block]:
        """The blocks that the policy asks for. Raises ConfigError, naming the policy, where that is not possible."""
        try:
            expert_TK = routing.expert_TK if selection.expert_TK is None else selection.expert_TK
            return group(expert_TK, selection.device_TK, *routing.holds_NE.shape)
        except ValueError as error:
            raise ConfigError(f"policy {self.policy.name}: {error}") from None

    def finish(
        self,
        routing: Routing,
        state: State,
        selection: Selection,
        outcomes: Sequence[Outcome],
        final_TK: FloatArray,
        times: RoundTimes,
    ) -> None:
        """Learn from a round and keep it for the log. Raises OrphanedTokensError where the run file asks for that."""
        for outcome in outcomes:
            if outcome.output is None:
                self._learning.missed(outcome)
        if self._recorder is not None:
            keys = {
                "round": self.rounds,
                "policy": self.policy_index,
                "prompt": self.prompt,
                "layer": routing.layer,
                "phase": int(self.phase),
                "attempt": 0,
                "dilation": self.dispatcher.dilation,
                "node_boot": [2**64 - 1 if node.boot_id is None else node.boot_id for node in self._nodes],
            }
            asked_3N = None if self.band is None or state.air is None else self.band.asked(state.air)
            self._unwritten.append(Finished(keys, routing, state, selection, outcomes, final_TK, times, asked_3N))
        self.rounds += 1
        self.on_round()
        if isinstance(self.policy, Steered):
            self.policy.observe(
                int(self.phase), times.round_ns / self.dispatcher.dilation / 1e9, dropped_share(routing, selection)
            )
        if self._fail_on_orphans and (lost := int(orphaned(routing, arrived(outcomes, selection.device_TK)).sum())):
            raise OrphanedTokensError(
                f"round {self.rounds - 1}, layer {routing.layer}: {lost} tokens lost all their "
                'experts: see events.jsonl for the nodes, or set [on_loss] orphaned = "zero"'
            )

    def settle(self) -> None:
        """Learn what could wait and write the rows of the rounds until now."""
        self._learning.answered(self._still_to_learn)
        self._still_to_learn.clear()
        unwritten, self._unwritten = self._unwritten, []
        self._settle_ns = monotonic_ns() + QUICK_NS
        if self._recorder is not None:
            for done in unwritten:
                self._recorder.record_round(*self._rows.of(done))
