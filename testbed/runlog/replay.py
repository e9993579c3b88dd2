"""What another policy would have answered on a run's recorded routing, estimates and links. No torch, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bs_node.band import BandPlan, loads, with_idle
from bs_node.blocks import group
from testbed.errors import ConfigError
from testbed.policies.base import FloatArray, IntArray, Policy, Selection
from testbed.policies.loading import make_policy
from testbed.policies.selection import dropped_share
from testbed.policies.steering import SteerablePolicy, Steered
from testbed.runlog.replay_inputs import OF_POLICY, Floats, Log, RecordedPolicy, RecordedRound

SHARE_BY_THEMSELVES = ("joint", "oracle")
CANNOT_KNOW = (
    "replay cannot know: what a dropped or substituted pair changes in the hidden states, and so in the routing of "
    "later layers and of later tokens; every block is replayed with the routing that was recorded",
    "replay cannot know: what the base station would have estimated by then; fewer rows teach less and at other times, "
    "and every block is replayed with the estimates that were recorded",
    "replay cannot know: perplexity, accuracy and text under the other policy, nor the base station's own time for it",
)


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was decided in R rounds: pairs, and the shares of the band that links were held to."""

    selections: list[Selection]
    rows_RN: IntArray
    experts_RN: IntArray
    share_RN: Floats  # sums to 1 but for what idle devices keep; even where no band was shared out


def replayed(recorded: RecordedPolicy, policy: Policy, plan: BandPlan | None = None) -> Decisions:
    """Asks `policy` in every recorded round, in their order, as a base station would.

    plan: how the band is shared out under it where it does not say so itself. A policy that is steered hears of the
    times that were recorded, so it is only replayed on its own rounds. Raises ConfigError, naming the policy, where the
    log lacks what it needs or its answer cannot be carried out.
    """
    plan = BandPlan() if plan is None else plan
    devices = len(recorded.blocks[0].state.row_s_N)
    measured_s_R = recorded.measured_s_R
    selections, loads_R, share_RN = [], [], np.full((len(recorded.blocks), devices), 1 / devices)
    for r, block in enumerate(recorded.blocks):
        selection, (rows_N, experts_N), share_N = _decide(block, policy, plan)
        selections.append(selection)
        loads_R.append((rows_N, experts_N))
        if share_N is not None:
            share_RN[r] = with_idle(share_N)
        if isinstance(policy, Steered):
            policy.observe(block.phase, float(measured_s_R[r]), dropped_share(block.routing, selection))
    rows_RN, experts_RN = (np.array(load_RN) for load_RN in zip(*loads_R, strict=True))
    return Decisions(selections, rows_RN, experts_RN, share_RN)


def _decide(
    block: RecordedRound, policy: Policy, plan: BandPlan
) -> tuple[Selection, tuple[IntArray, IntArray], FloatArray | None]:
    """The answer, the rows and experts of each device, and the shares of the band; None: even."""
    if isinstance(policy, Steered):
        policy.begin(block.phase)
    routing, state = block.routing, block.state
    selection = policy.select(routing, state)
    expert_TK = routing.expert_TK if selection.expert_TK is None else selection.expert_TK
    shape = routing.expert_TK.shape
    if not shape == selection.device_TK.shape == selection.weight_TK.shape == expert_TK.shape:
        raise ConfigError(f"policy {policy.name}: answers must have the shape of expert_TK")
    try:
        blocks = group(expert_TK, selection.device_TK, *routing.holds_NE.shape)
    except ValueError as error:
        raise ConfigError(f"policy {policy.name}: {error}") from None
    own_share_N = selection.bandwidth_share_N
    share_N = plan.share_N(blocks, state, block.prompt) if own_share_N is None else own_share_N
    return selection, loads(blocks, len(state.row_s_N)), share_N


def as_recorded(log: Log, recorded: RecordedPolicy) -> Decisions:
    """What was really decided, in the form of a replay: to predict its times in the same way."""
    deadline = None
    if recorded.spec["name"] == "drop_late":
        first = recorded.blocks[0]
        deadline = make_policy("drop_late", params_of(recorded.spec)).select(first.routing, first.state).deadline
    selections = [
        Selection(block.device_TK, block.final_TK, expert_TK=block.expert_TK, deadline=deadline)
        for block in recorded.blocks
    ]
    rows_RN, experts_RN = (recorded.of_rounds(name).astype(np.int64) for name in ("rows", "experts_touched"))
    share_RN = np.full(rows_RN.shape, 1 / rows_RN.shape[1])
    if "bandwidth_hz" in recorded.rounds.column_names and log.radio:
        given_RN = recorded.of_rounds("bandwidth_hz").astype(float) / float(log.radio["bandwidth_hz"])
        even_RN = np.isclose(given_RN, share_RN, rtol=1e-6) | np.isnan(given_RN)
        share_RN = np.where(even_RN, share_RN, given_RN)
    return Decisions(selections, rows_RN, experts_RN, share_RN)


def refusal(recorded: RecordedPolicy, name: str, bandwidth: str = "even") -> str | None:
    """Why a policy cannot be replayed on these rounds, in one line that names it; None: it can."""
    if name == "substitute" and recorded.blocks[0].routing.score_TE is None:
        return "substitute: the log kept no score of the experts that were not chosen; record with [log] scores"
    if bandwidth == "even" and name not in SHARE_BY_THEMSELVES:
        return None
    what = name if bandwidth == "even" else f"{name} with bandwidth {bandwidth!r}"
    if recorded.no_air is not None:
        return f"{what}: {recorded.no_air}; name a policy that leaves the band as it is, with bandwidth even"
    if bandwidth != "even" and recorded.blocks[0].state.air is None:
        return f"{what}: the run had no band to share out; leave bandwidth even"
    return None


def precision_notes(log: Log, recorded: RecordedPolicy, name: str, bandwidth: str = "even") -> list[str]:
    """Where what the log keeps is less than what the policy saw."""
    notes = [f"left out: {log.left_out} rounds, since the log lost tokens of theirs"] if log.left_out else []
    if name == "substitute" and log.scores == "float16":
        notes.append(
            "substitute: scores were kept in half precision: its weights are right to 1 in 2000, and a choice between "
            "two experts closer than that, or that close to min_ratio, may fall the other way; [log] scores = "
            '"float32" keeps them'
        )
    if recorded.blocks[0].state.air is not None and (name in SHARE_BY_THEMSELVES or bandwidth != "even"):
        notes.append(
            "shares of the band: the links' state is solved from the rates that were asked, kept in single precision: "
            "shares are right to about 1e-6, and a choice of joint or oracle between two pairs closer than that may "
            "fall the other way; a link estimated at more than 64 bit/s per Hz counts as that, whatever its rows took"
        )
    return notes


def policy_as_run(log: Log, index: int) -> Policy:
    """Policy `index` as the run made it, steered where that was asked for. Raises ConfigError."""
    spec = log.manifest["config"]["policy"][index]
    policy = make_policy(spec["name"], params_of(spec))
    steering = log.manifest["config"].get("steering") or {}
    target_ms, dropped_mass = steering.get("target_ms"), steering.get("quality_budget")
    if isinstance(policy, SteerablePolicy) and (target_ms is not None or dropped_mass is not None):
        return Steered(policy, None if target_ms is None else target_ms / 1e3, dropped_mass)
    return policy


def plan_as_run(spec: Mapping[str, Any]) -> BandPlan:
    """How the band was shared out under a policy of the run file."""
    return BandPlan(spec.get("bandwidth", "even"), spec.get("period", "block"))


def params_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in OF_POLICY}
