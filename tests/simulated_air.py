"""Links and nodes that take exactly the time that Eq. 2 and 3 say: simulated, without sockets and without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic_ns

import numpy as np

from bs_node.blocks import Block, Combiner, Float32, Outcome, PlainRows, arrived
from bs_node.dispatcher import NOBODY, ExchangeTimes, Watcher
from bs_node.round import EarlyEnd
from bs_node.rows import RoundTimes
from bs_node.session import Session
from testbed.latency.model import rate_bits_per_s
from testbed.policies.base import FloatArray, Routing, Selection, State
from testbed.policies.selection import arrived_weights
from testbed.runlog.schema import Status

BAND_HZ, ROW_BYTES, HEADER_BYTES = 100e6, 4100, 100
ROW_COMPUTE_S = 1e-3


class SimulatedAir:
    """A dispatcher whose devices answer with twice what they get, those in `lost` never. Every clock shows the same."""

    def __init__(self, snr_hz_WN: FloatArray, delay_s: float = 0.0) -> None:
        self.dilation = 1.0
        self.air_ratio_WN: FloatArray | None = None
        self.snr_hz_WN, self.delay_s = snr_hz_WN, delay_s
        self.share_N = np.full(snr_hz_WN.shape[1], 1 / snr_hz_WN.shape[1])
        self.lost: set[int] = set()
        self.outcomes: list[Outcome] = []  # of the latest exchange
        self.now_ns = 10**12

    def share_band(self, share_N: FloatArray) -> None:
        self.share_N = share_N

    def air_s(self, way: int, device: int, rows: int) -> float:
        rate = rate_bits_per_s(self.share_N[device] * BAND_HZ, self.snr_hz_WN[way, device], 1.0, 1.0)
        return self.delay_s + 8 * (rows * ROW_BYTES + HEADER_BYTES) / float(rate)

    def even_row_s_WN(self) -> FloatArray:
        """Of a row on the air, if the band were split evenly."""
        even_hz = BAND_HZ / len(self.share_N)
        return np.asarray(8 * ROW_BYTES / rate_bits_per_s(even_hz, self.snr_hz_WN, 1.0, 1.0))

    def refresh(self) -> None:
        """Nobody comes or goes."""

    def collect_late(self) -> list[Outcome]:
        return []

    def probe(self, device: int, layer: int, expert: int, width: int) -> None:
        """Nobody is unused for long."""

    def exchange(
        self,
        number: int,  # noqa: ARG002 - as all dispatchers
        layer: int,  # noqa: ARG002
        hidden_TD: Float32,
        blocks: Sequence[Block],
        watcher: Watcher = NOBODY,
        early_end: EarlyEnd | None = None,  # noqa: ARG002
    ) -> tuple[list[Outcome], ExchangeTimes]:
        watcher.sent()
        self.outcomes = [self._outcome(block, hidden_TD) for block in blocks]
        for outcome in self.outcomes:
            if outcome.status is Status.ANSWERED:
                watcher.answered(outcome)
        self.now_ns += 10**9
        return self.outcomes, ExchangeTimes()

    def _outcome(self, block: Block, hidden_TD: Float32) -> Outcome:
        if block.device in self.lost:
            return Outcome(block, Status.LOST)
        times_s = (
            self.air_s(0, block.device, block.rows),
            ROW_COMPUTE_S * block.rows,
            self.air_s(1, block.device, block.rows),
        )
        stamps = (self.now_ns + np.cumsum([0, *times_s]) * self.dilation * 1e9).astype(int).tolist()
        outcome = Outcome(block, Status.ANSWERED, PlainRows(2 * hidden_TD[block.token_R]), dilation=self.dilation)
        outcome.bytes_down = outcome.bytes_up = block.rows * ROW_BYTES + HEADER_BYTES
        outcome.bs_sent_ns, outcome.node_received_ns, outcome.node_sent_ns, outcome.bs_received_ns = stamps
        if self.air_ratio_WN is not None:
            outcome.air_ratio = tuple(self.air_ratio_WN[:, block.device].tolist())
        return outcome


def heartbeats(session: Session) -> None:
    """Tell the base station what every node's clock shows now, where the air is a simulated one."""
    if not isinstance(session.dispatcher, SimulatedAir):
        return
    now_ns = session.dispatcher.now_ns
    for node in session._nodes:
        node.clock.exchange(now_ns, now_ns + 1, now_ns + 1, now_ns + 2)


def play(session: Session, routing: Routing, width: int = 4) -> tuple[State, Selection, Float32]:
    """A round as the experts' function has it, without torch: what was seen, chosen, and came out of rows of ones."""
    heartbeats(session)
    times = RoundTimes(monotonic_ns())
    state = session.state()
    selection = session.select(routing, state)
    hidden_TD = np.ones((len(routing.expert_TK), width), np.float32)
    combiner = Combiner(session.group(routing, selection), selection.weight_TK, lambda: np.zeros_like(hidden_TD))
    outcomes, _ = session.exchange(routing, state, selection, hidden_TD, combiner)
    arrived_TK = arrived(outcomes, selection.device_TK)
    final_TK = selection.weight_TK if arrived_TK.all() else arrived_weights(selection, arrived_TK)
    times.combined(combiner.spent_ns)
    session.finish(routing, state, selection, outcomes, final_TK, times)
    return state, selection, combiner.out_TD
