"""A replayed policy beside the one that was really run: what it keeps, who gets how much, how long blocks take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bs_node.band import BandPlan
from testbed.errors import ConfigError
from testbed.experiment.statistics import paired_cut_interval
from testbed.policies.base import BoolArray, Policy
from testbed.policies.loading import label
from testbed.runlog.replay import (
    CANNOT_KNOW,
    Decisions,
    as_recorded,
    precision_notes,
    refusal,
    replayed,
)
from testbed.runlog.replay_inputs import Floats, Log, RecordedPolicy
from testbed.runlog.replay_latency import PredictedTimes, predicted_times
from testbed.runlog.schema import GenerationPhase

CUTS = (
    "cut, of predicted: model against model, both on the recorded rounds; cut, of measured: the prediction against the "
    "time that the recorded rounds really took, the prediction's own error included (--validate tells it)",
)


@dataclass(frozen=True, slots=True)
class PredictedCut:
    """Block times by one way to predict them. Cuts are 1 - sum / sum over the same rounds, with the bootstrap's 95 %
    interval over prompts (NaN: one prompt alone has none)."""

    by: str  # estimates, or the true channel
    rounds: int  # in which every device has answered and all that is needed is known
    recorded_p50_s: float  # what was really decided, predicted likewise
    replayed_p50_s: float
    cut: float  # of the recorded decisions' time, predicted likewise: model against model
    cut_low: float
    cut_high: float
    cut_of_measured: float  # of what the recorded rounds really took
    cut_of_measured_low: float
    cut_of_measured_high: float


@dataclass(frozen=True, slots=True)
class ReplayedPhase:
    """Prefill or decode. `recorded` is the policy that was really run."""

    phase: str
    prompts: int
    rounds: int
    kept_fraction: float  # of the pairs (token, expert) that the gate chose
    recorded_kept_fraction: float
    dropped_mass: float  # share of the gate's weight that its own expert does not compute
    recorded_dropped_mass: float
    rows_per_round: dict[str, float]  # mean, by device
    recorded_rows_per_round: dict[str, float]
    measured_p50_s: float  # recorded rounds; dilation taken out where times were stretched
    predicted: list[PredictedCut]


@dataclass(frozen=True, slots=True)
class ReplayResults:
    run: str
    directory: str
    recorded: str
    policy: str
    params: dict[str, Any]
    bandwidth: str
    period: str
    times_are: str
    phases: list[ReplayedPhase]
    notes: list[str]

    def document(self) -> dict[str, Any]:
        """For machines: the last line of `testbed logs replay --json`."""
        return {"kind": "replayed", **asdict(self), "label": self.label}

    @property
    def label(self) -> str:
        return label(self.policy, self.params, self.bandwidth, self.period)


def replay(
    log: Log, recorded: RecordedPolicy, policy: Policy, bandwidth: str = "even", period: str = "block"
) -> ReplayResults:
    """What `policy` would have done in the recorded rounds. Raises ConfigError where the log lacks what it needs."""
    refused = refusal(recorded, policy.name, bandwidth)
    if refused is not None:
        raise ConfigError(f"{log.run_dir.name}: {refused}")
    plan = BandPlan(bandwidth, period)  # type: ignore[arg-type]  # the command line knows these words only
    decided = replayed(recorded, policy, plan), as_recorded(log, recorded)
    times = [predicted_times(log, recorded, decisions) for decisions in decided]
    phases = [
        _phase(log, recorded, phase, decided, times) for phase in GenerationPhase if (recorded.phase_R == phase).any()
    ]
    return ReplayResults(
        log.run_dir.name, str(log.run_dir), recorded.label, policy.name, dict(policy.params), bandwidth, period,
        times_are(log), phases, [*CUTS, *precision_notes(log, recorded, policy.name, bandwidth), *CANNOT_KNOW],
    )  # fmt: skip


def times_are(log: Log) -> str:
    """Where the recorded times come from, in words."""
    if not log.manifest.get("emulated"):
        return f"measured; links: {log.manifest['links']}"
    return f"measured on emulated devices, dilation taken out; links: {log.manifest['links']}"


def _phase(
    log: Log,
    recorded: RecordedPolicy,
    phase: GenerationPhase,
    decided: tuple[Decisions, Decisions],
    times: list[list[PredictedTimes]],
) -> ReplayedPhase:
    mine_R = recorded.phase_R == phase
    (replayed_kept, replayed_mass), (kept, mass) = (
        _kept(recorded, mine_R, decided[0], times[0][0].kept(decided[0])),
        _kept(recorded, mine_R, decided[1], [block.arrived_TK for block in recorded.blocks]),
    )
    rows_N, recorded_rows_N = (decisions.rows_RN[mine_R].mean(axis=0).tolist() for decisions in decided)
    return ReplayedPhase(
        phase.name.lower(),
        len(np.unique(recorded.prompt_R[mine_R])),
        int(mine_R.sum()),
        replayed_kept,
        kept,
        replayed_mass,
        mass,
        dict(zip(log.devices, rows_N, strict=True)),
        dict(zip(log.devices, recorded_rows_N, strict=True)),
        float(np.median(recorded.measured_s_R[mine_R])),
        [_cut(recorded, mine_R, *pair) for pair in zip(*times, strict=True)],
    )


def _kept(
    recorded: RecordedPolicy, mine_R: BoolArray, decisions: Decisions, kept: list[BoolArray]
) -> tuple[float, float]:
    """Share of pairs computed, and share of the gate's weight whose own expert was not: dropped, or substituted."""
    pairs = kept_pairs = 0
    weight = gone = 0.0
    for r in np.flatnonzero(mine_R):
        routing, expert_TK = recorded.blocks[r].routing, decisions.selections[r].expert_TK
        own_TK = kept[r] if expert_TK is None else kept[r] & (expert_TK == routing.expert_TK)
        weight_TK = routing.weight_TK.astype(np.float64)
        pairs, kept_pairs = pairs + kept[r].size, kept_pairs + int(kept[r].sum())
        weight, gone = weight + float(weight_TK.sum()), gone + float(weight_TK[~own_TK].sum())
    return kept_pairs / pairs, gone / weight if weight > 0 else np.nan


def _cut(recorded: RecordedPolicy, mine_R: BoolArray, new: PredictedTimes, old: PredictedTimes) -> PredictedCut:
    use_R = mine_R & recorded.answered_R & np.isfinite(new.round_s_R) & np.isfinite(old.round_s_R)
    if not use_R.any():
        return PredictedCut(new.by, 0, *[np.nan] * 8)
    prompt_R = np.unique(recorded.prompt_R[use_R], return_inverse=True)[1]
    new_s_P, old_s_P, measured_s_P = (
        np.bincount(prompt_R, round_s_R[use_R]).astype(float)
        for round_s_R in (new.round_s_R, old.round_s_R, recorded.measured_s_R)
    )
    return PredictedCut(
        new.by,
        int(use_R.sum()),
        _median(old.round_s_R[use_R]),
        _median(new.round_s_R[use_R]),
        *paired_cut_interval(new_s_P, old_s_P),
        *paired_cut_interval(new_s_P, measured_s_P),
    )


def _median(values: Floats) -> float:
    return float(np.median(values))
