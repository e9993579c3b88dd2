"""How long replayed rounds would have taken: by what was estimated then, and by the channel that was emulated.

R rounds, N devices, W ways (down, up).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from testbed.experiment.emulated_time import air_seconds, emulated_compute_s
from testbed.policies.bandwidth import device_times_s
from testbed.policies.base import DROPPED, BoolArray
from testbed.runlog.replay import Decisions
from testbed.runlog.replay_inputs import Floats, Log, RecordedPolicy, bytes_per_row_expert_block
from testbed.simulation.kernels import turns_on_one_air
from testbed.simulation.montecarlo import deadline_s

ESTIMATES, CHANNEL = "estimates", "channel"


@dataclass(frozen=True, slots=True)
class PredictedTimes:
    """Seconds by one way to predict them: `estimates`, what the base station knew, or `channel`, the emulated truth.

    NaN where a device that gets rows was never measured.
    """

    by: str
    device_s_RN: Floats  # 0 where a device gets no rows
    round_s_R: Floats

    def kept(self, decisions: Decisions) -> list[BoolArray]:
        """kept_TK of every round: pairs that are sent and, where a round ends early, answered by then."""
        kept = [selection.device_TK != DROPPED for selection in decisions.selections]
        for r, selection in enumerate(decisions.selections):
            if selection.deadline is not None:
                kept[r] &= self.device_s_RN[r][selection.device_TK] <= self.round_s_R[r]
        return kept


def predicted_times(log: Log, recorded: RecordedPolicy, decisions: Decisions) -> list[PredictedTimes]:
    """By the recorded estimates and, first, by the true channel where both links and devices were emulated.

    A round waits for its slowest device; what the base station itself spends is in neither.
    """
    device_s_RN = _by_estimates(recorded, decisions)
    times = [PredictedTimes(ESTIMATES, device_s_RN, _ended(decisions, device_s_RN, device_s_RN.max(axis=1)))]
    if log.manifest.get("emulated") and log.radio:
        times.insert(0, _by_channel(log, recorded, decisions))
    return times


def _by_estimates(recorded: RecordedPolicy, decisions: Decisions) -> Floats:
    rounds = zip(recorded.blocks, decisions.rows_RN, decisions.experts_RN, decisions.share_RN, strict=True)
    return np.stack(
        [
            device_times_s(rows_N, experts_N, block.state, None if block.state.air is None else share_N)
            for block, rows_N, experts_N, share_N in rounds
        ]
    )


def _by_channel(log: Log, recorded: RecordedPolicy, decisions: Decisions) -> PredictedTimes:
    """Eq. 6 with the replayed rows, experts and bytes of each device and the true channel of its prompt."""
    rounds, shape = _with_loads(log, recorded.rounds, decisions), decisions.rows_RN.shape
    air_s_RWN = air_seconds(rounds, log.manifest, log.events).reshape(*shape, 2).transpose(0, 2, 1)
    off_air_s_RN = emulated_compute_s(rounds, log.manifest, log.events).reshape(shape)
    off_air_s_RN += 2 * float(log.radio.get("delay_s", 0.0))
    device_s_RN = np.where(decisions.rows_RN > 0, off_air_s_RN + air_s_RWN.sum(axis=1), 0.0)
    round_s_R = device_s_RN.max(axis=1)
    if log.radio.get("medium") == "shared":
        round_s_R = _in_turns(air_s_RWN, device_s_RN)
    return PredictedTimes(CHANNEL, device_s_RN, _ended(decisions, device_s_RN, round_s_R))


def _with_loads(log: Log, rounds: pa.Table, decisions: Decisions) -> pa.Table:
    """The recorded rounds with what each device would have been sent, in bytes as messages of this run weigh."""
    rows_B, experts_B = decisions.rows_RN.reshape(-1), decisions.experts_RN.reshape(-1)
    grows_BC = np.column_stack([rows_B, experts_B, np.ones(len(rows_B))])
    bytes_B = {
        name: np.where(rows_B > 0, grows_BC @ per_C, 0.0)
        for name, per_C in zip(("bytes_down", "bytes_up"), bytes_per_row_expert_block(log), strict=True)
    }
    columns = {"rows": rows_B, "experts_touched": experts_B, **bytes_B}
    if "bandwidth_hz" in rounds.column_names and rounds["bandwidth_hz"].null_count < rounds.num_rows:
        columns["bandwidth_hz"] = decisions.share_RN.reshape(-1) * float(log.radio["bandwidth_hz"])
    for name, values in columns.items():
        rounds = rounds.set_column(rounds.column_names.index(name), name, pa.array(values))
    return rounds


def _in_turns(air_s_RWN: Floats, device_s_RN: Floats) -> Floats:
    """Where all links share the air, as in a simulation: a device's whole block is its one row."""
    round_s_R1 = np.empty((len(device_s_RN), 1))
    ones_R1N = np.ones((len(device_s_RN), 1, device_s_RN.shape[1]), np.int64)
    turns_on_one_air(ones_R1N, device_s_RN[:, None], np.ascontiguousarray(air_s_RWN), round_s_R1)
    return round_s_R1[:, 0]


def _ended(decisions: Decisions, device_s_RN: Floats, round_s_R: Floats) -> Floats:
    """Where a policy sets a deadline the round is over by then."""
    ended_s_R = round_s_R.copy()
    for r, selection in enumerate(decisions.selections):
        if selection.deadline is not None:
            ended_s_R[r] = min(ended_s_R[r], deadline_s(selection.deadline, selection.device_TK, device_s_RN[r]))
    return ended_s_R
