"""Whether a replay can be believed: policies that were really run, replayed on their own rounds and on another's."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from testbed.errors import ConfigError, RunLogError
from testbed.policies.base import DROPPED, Selection
from testbed.policies.selection import arrived_weights
from testbed.policies.steering import Steered
from testbed.runlog.replay import (
    SHARE_BY_THEMSELVES,
    as_recorded,
    plan_as_run,
    policy_as_run,
    precision_notes,
    refusal,
    replayed,
)
from testbed.runlog.replay_inputs import Floats, Log, RecordedPolicy, RecordedRound, recorded_policy
from testbed.runlog.replay_latency import predicted_times
from testbed.runlog.schema import GenerationPhase

CLAIM = 0.15  # the most by which predicted and measured differ, in the median over a policy's rounds
SHARES_WITHIN = 1e-4  # relative: what the band was split into


@dataclass(frozen=True, slots=True)
class Reproduced:
    """A policy replayed on its own rounds. `same`: rounds in which every pair went where it really went."""

    policy: str
    rounds: int
    same: int
    same_weights: int
    same_shares: int | None  # None where no band was shared out
    exact_inputs: bool  # the log keeps all that it was given, to the last bit
    refused: str | None = None

    @property
    def holds(self) -> bool:
        """All rounds, where the log keeps all that the policy was given."""
        return self.refused is not None or not self.exact_inputs or self.same == self.same_weights == self.rounds


@dataclass(frozen=True, slots=True)
class CrossPredicted:
    """A policy replayed on the base policy's rounds, beside really running it in the same places of the workload.

    A difference is |predicted - measured| / measured, in the median over rounds. What is claimed is that of both phases
    together, by the true channel where that is known and else by the estimates.
    """

    policy: str
    phase: str  # prefill, decode or both
    rounds: int
    by: str
    measured_p50_s: float
    predicted_p50_s: float
    difference_p50: float
    claimed: bool


@dataclass(frozen=True, slots=True)
class Validation:
    run: str
    base: str
    reproduced: list[Reproduced]
    predicted: list[CrossPredicted]
    notes: list[str]
    claim: float = CLAIM

    @property
    def reproduces(self) -> bool:
        return all(row.holds for row in self.reproduced)

    @property
    def predicts(self) -> bool:
        return all(row.difference_p50 <= self.claim for row in self.predicted if row.claimed)

    def document(self) -> dict[str, Any]:
        """For machines: the last line of `testbed logs replay --validate --json`."""
        kind = "replay validated"
        return {"kind": kind, "reproduces": self.reproduces, "predicts": self.predicts, **asdict(self)}


def validate(log: Log, base: int = 0) -> Validation:
    """Replays all policies of a run on their own rounds and on those of `base`. Raises RunLogError, ConfigError."""
    base_rounds = recorded_policy(log, base)
    reproduced: list[Reproduced] = []
    predicted: list[CrossPredicted] = []
    notes: list[str] = []
    for index, name in enumerate(log.manifest["policies"]):
        try:
            recorded = base_rounds if index == base else recorded_policy(log, index)
            reproduced.append(_reproduced(log, recorded))
        except (ConfigError, RunLogError) as error:
            reproduced.append(Reproduced(name, 0, 0, 0, None, False, str(error)))
            continue
        notes += precision_notes(log, recorded, recorded.spec["name"], recorded.spec.get("bandwidth", "even"))
        if index != base:
            predicted += _cross_predicted(log, base_rounds, recorded)
    return Validation(log.run_dir.name, base_rounds.label, reproduced, predicted, list(dict.fromkeys(notes)))


def _reproduced(log: Log, recorded: RecordedPolicy) -> Reproduced:
    name, bandwidth = recorded.spec["name"], recorded.spec.get("bandwidth", "even")
    refused = refusal(recorded, name, bandwidth)
    if refused is not None:
        raise ConfigError(refused)
    decisions = replayed(recorded, policy_as_run(log, recorded.index), plan_as_run(recorded.spec))
    pairs = list(zip(recorded.blocks, decisions.selections, strict=True))
    shared = name in SHARE_BY_THEMSELVES or bandwidth != "even"
    has_air = recorded.blocks[0].state.air is not None
    really_RN = as_recorded(log, recorded).share_RN
    same_shares_R = np.isclose(decisions.share_RN, really_RN, rtol=SHARES_WITHIN).all(axis=1)
    decides_by_air = has_air and name in SHARE_BY_THEMSELVES
    return Reproduced(
        recorded.label,
        len(pairs),
        sum(_same_pairs(block, selection) for block, selection in pairs),
        sum(_same_weights(block, selection) for block, selection in pairs),
        int(same_shares_R.sum()) if shared and has_air else None,
        not decides_by_air and not (name == "substitute" and log.scores != "float32"),
    )


def _same_pairs(block: RecordedRound, selection: Selection) -> bool:
    sent_TK = selection.device_TK != DROPPED
    expert_TK = block.routing.expert_TK if selection.expert_TK is None else selection.expert_TK
    same_device = np.array_equal(selection.device_TK, block.device_TK)
    return same_device and np.array_equal(expert_TK[sent_TK], block.expert_TK[sent_TK])


def _same_weights(block: RecordedRound, selection: Selection) -> bool:
    """The weights of the sum, once what was lost on the way is taken out of the replay as it was out of the round."""
    if not _same_pairs(block, selection):
        return False
    weight_TK = selection.weight_TK
    if not np.array_equal(block.arrived_TK, selection.device_TK != DROPPED):
        weight_TK = arrived_weights(selection, block.arrived_TK)
    return np.array_equal(weight_TK.astype(np.float32), block.final_TK)


def _cross_predicted(log: Log, base: RecordedPolicy, really: RecordedPolicy) -> list[CrossPredicted]:
    """Nothing where what the policy needs is not in the base's rounds, or follows what it was itself measured at."""
    policy = policy_as_run(log, really.index)
    bandwidth = really.spec.get("bandwidth", "even")
    if isinstance(policy, Steered) or refusal(base, really.spec["name"], bandwidth) is not None:
        return []
    times = predicted_times(log, base, replayed(base, policy, plan_as_run(really.spec)))
    place_of = {place: r for r, place in enumerate(_places(base))}
    pairs = [(place_of[place], r) for r, place in enumerate(_places(really)) if place in place_of]
    if not pairs:
        return []
    base_R, really_R = (np.array(rounds, np.int64) for rounds in zip(*pairs, strict=True))
    phases = {"both": really.phase_R[really_R] >= 0}
    phases |= {phase.name.lower(): really.phase_R[really_R] == phase for phase in GenerationPhase}
    answered_P = really.answered_R[really_R]
    rows = []
    for by in times:
        predicted_s_P, measured_s_P = by.round_s_R[base_R], really.measured_s_R[really_R]
        for phase, mine_P in phases.items():
            use_P = mine_P & answered_P & np.isfinite(predicted_s_P)
            if use_P.any():
                claimed = phase == "both" and by is times[0]
                medians = _medians(measured_s_P[use_P], predicted_s_P[use_P])
                rows.append(CrossPredicted(really.label, phase, int(use_P.sum()), by.by, *medians, claimed))
    return rows


def _medians(measured_s_P: Floats, predicted_s_P: Floats) -> tuple[float, float, float]:
    difference_P = np.abs(predicted_s_P - measured_s_P) / measured_s_P
    return float(np.median(measured_s_P)), float(np.median(predicted_s_P)), float(np.median(difference_P))


def _places(recorded: RecordedPolicy) -> list[tuple[int, int, int, int]]:
    """Where in the workload each round belongs: prompt, phase, layer, and which such round it is."""
    seen: Counter[tuple[int, int, int]] = Counter()
    places = []
    for block in recorded.blocks:
        where = block.prompt, block.phase, block.routing.layer
        places.append((*where, seen[where]))
        seen[where] += 1
    return places
