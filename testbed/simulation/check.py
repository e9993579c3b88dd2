"""Whether the analytic model holds: its time of every round of a finished run beside the one measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from testbed.errors import ConfigError
from testbed.experiment.emulated_time import air_seconds, emulated_compute_s
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import GenerationPhase, Status
from testbed.simulation.kernels import Floats, turns_on_one_air

CLAIM = 0.15  # the most by which the two differ, in the median over rounds


@dataclass(frozen=True, slots=True)
class CheckedPolicy:
    """One policy's rounds of one phase. A difference is |simulated - measured| / measured."""

    policy: str
    phase: str
    rounds: int
    measured_p50_s: float  # emulated time: dilation taken out
    simulated_p50_s: float
    difference_p50: float
    difference_p90: float


@dataclass(frozen=True, slots=True)
class CheckResults:
    run: str
    difference_p50: float
    rows: list[CheckedPolicy]
    claim: float = CLAIM

    @property
    def holds(self) -> bool:
        return self.difference_p50 <= self.claim

    def document(self) -> dict[str, Any]:
        """For machines: the last line of `testbed simulate --check RUN --json`."""
        return {
            "kind": "simulated against measured",
            "run": self.run,
            "difference_p50": self.difference_p50,
            "claim": self.claim,
            "holds": self.holds,
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True, slots=True)
class _Rounds:
    """One value per round in which every device that was asked has answered."""

    policy_R: NDArray[np.int64]
    phase_R: NDArray[np.int64]
    measured_s_R: Floats
    simulated_s_R: Floats

    @property
    def difference_R(self) -> Floats:
        difference_R: Floats = np.abs(self.simulated_s_R - self.measured_s_R) / self.measured_s_R
        return difference_R


def check_run(run_dir: Path) -> CheckResults:
    """Compares every round of a run whose links and devices were emulated. Raises RunLogError, ConfigError."""
    manifest, events = read_manifest(run_dir), read_events(run_dir)
    if not manifest["emulated"] or not manifest["config"].get("radio"):
        raise ConfigError(f"{run_dir}: neither links nor devices were emulated, so there is no model to check; name a "
                          "run of a run file with [radio] and emulated_flops_per_s")  # fmt: skip
    rounds = _rounds(read_table(run_dir, "rounds"), manifest, events)
    rows = [
        _row(name, phase, rounds, (rounds.policy_R == index) & (rounds.phase_R == phase))
        for index, name in enumerate(manifest["policies"])
        for phase in GenerationPhase
        if ((rounds.policy_R == index) & (rounds.phase_R == phase)).any()
    ]
    return CheckResults(run_dir.name, float(np.median(rounds.difference_R)), rows)


def _row(policy: str, phase: GenerationPhase, rounds: _Rounds, mine_R: NDArray[np.bool_]) -> CheckedPolicy:
    difference_R = rounds.difference_R[mine_R]
    return CheckedPolicy(
        policy,
        phase.name.lower(),
        int(mine_R.sum()),
        float(np.median(rounds.measured_s_R[mine_R])),
        float(np.median(rounds.simulated_s_R[mine_R])),
        *(float(value) for value in np.percentile(difference_R, [50, 90])),
    )


def _rounds(rounds: pa.Table, manifest: Mapping[str, Any], events: list[dict[str, Any]]) -> _Rounds:
    devices = len(manifest["devices"])
    first = slice(None, None, devices)  # every round has a row for every device
    column = {name: rounds[name].to_numpy()[first] for name in ("policy", "phase", "round_ns", "dilation")}
    measured_s_R = column["round_ns"] / column["dilation"] / 1e9
    air_s_RWN = air_seconds(rounds, manifest, events).reshape(-1, devices, 2).transpose(0, 2, 1)
    sent_RN = (rounds["rows"].to_numpy() > 0).reshape(-1, devices)
    off_air_s_RN = emulated_compute_s(rounds, manifest, events).reshape(-1, devices) + 2 * _delay_s(manifest)
    device_s_RN = np.where(sent_RN, off_air_s_RN + air_s_RWN.sum(axis=1), 0.0)
    shared = manifest["config"]["radio"].get("medium") == "shared"
    simulated_s_R = _in_turns(air_s_RWN, device_s_RN) if shared else device_s_RN.max(axis=1)
    answered_R = rounds["status"].to_numpy().reshape(-1, devices).max(axis=1) == Status.ANSWERED
    use = answered_R & (simulated_s_R > 0)
    return _Rounds(
        column["policy"][use].astype(np.int64), column["phase"][use].astype(np.int64),
        measured_s_R[use], simulated_s_R[use],
    )  # fmt: skip


def _delay_s(manifest: Mapping[str, Any]) -> float:
    return float(manifest["config"]["radio"].get("delay_s", 0.0))


def _in_turns(air_s_RWN: Floats, device_s_RN: Floats) -> Floats:
    """The rounds' times where all links share the air, as in a simulation: a device's whole block is its one row."""
    round_s_R1 = np.empty((len(device_s_RN), 1))
    ones_R1N = np.ones((len(device_s_RN), 1, device_s_RN.shape[1]), np.int64)
    turns_on_one_air(ones_R1N, device_s_RN[:, None], np.ascontiguousarray(air_s_RWN), round_s_R1)
    return round_s_R1[:, 0]
