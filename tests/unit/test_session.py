"""What rounds share: the band they split, the strength they steer, and what they teach under shares that change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from simulated_air import BAND_HZ, HEADER_BYTES, ROW_BYTES, ROW_COMPUTE_S, SimulatedAir, heartbeats, play
from spread_columns import spread

from bs_node.band import Band, BandPlan
from bs_node.probing import Prober
from bs_node.registry import Node
from bs_node.rows import RoundTimes
from bs_node.session import Session
from testbed.errors import ConfigError
from testbed.latency.csi import Csi, EstimatedCsi, ReportedCsi
from testbed.latency.estimator import Estimator
from testbed.policies.bandwidth import device_times_s
from testbed.policies.base import DROPPED, Policy, Routing, Selection, State
from testbed.policies.joint import Joint
from testbed.policies.load_aware import LoadAware
from testbed.policies.selection import finish
from testbed.policies.steering import Steered
from testbed.policies.topk import TopK
from testbed.runlog.schema import GenerationPhase

DEVICES, TOKENS, TOP_K = 4, 24, 2
SNR_HZ_WN = np.array([[1e9, 3e8, 1e8, 5e7], [2e8, 6e7, 4e7, 2e7]])
HOLDS_NE = np.eye(DEVICES, dtype=bool)


class Kept:
    """Stands for a recorder: keeps a copy of every round's columns."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.tokens: list[dict[str, Any]] = []

    def record_round(self, rounds: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
        self.rounds.append(spread(rounds))
        self.tokens.append({name: np.copy(value) for name, value in tokens.items()})

    def flush(self) -> None:
        """Nothing waits."""


def routings(count: int, seed: int = 0) -> list[Routing]:
    """Unequal loads, which change from block to block."""
    rng, found = np.random.default_rng(seed), []
    for layer in range(count):
        liking_E = rng.dirichlet(np.ones(DEVICES))
        score_TE = rng.dirichlet(1 + 20 * liking_E, TOKENS).astype(np.float32)
        expert_TK = np.argsort(-score_TE, axis=1)[:, :TOP_K]
        found.append(Routing(layer, expert_TK, np.take_along_axis(score_TE, expert_TK, 1), HOLDS_NE, score_TE))
    return found


def session_of(
    policy: Policy,
    air: SimulatedAir | None = None,
    *,
    csi: Csi | None = None,
    split: Any = "even",
    period: Any = "block",
    recorder: Any = None,
) -> Session:
    """Over links that share the band; estimated ones unless told otherwise, and clocks that are known to agree."""
    air = air or SimulatedAir(SNR_HZ_WN)
    csi = csi or EstimatedCsi(BAND_HZ, DEVICES, 8 * ROW_BYTES, 8 * ROW_BYTES)
    nodes = [Node(n, f"jetson-{n}", routing_id=b"x", boot_id=n) for n in range(DEVICES)]
    estimator = Estimator(DEVICES, ROW_BYTES, ROW_BYTES, header_bytes=HEADER_BYTES)
    band = Band(csi, DEVICES, air.share_band)
    session = Session(policy, air, estimator, nodes, recorder=recorder, band=band)
    session.plan = BandPlan(split, period)
    heartbeats(session)
    session.probe_at_join(Prober(air, 0, HOLDS_NE, width=4))
    return session


def asked_shares(kept: Kept) -> list[Any]:
    return [rounds["bandwidth_hz"] / BAND_HZ for rounds in kept.rounds]


# --- the band ---


@pytest.mark.parametrize("policy", [TopK(), Joint(budget=0.05)], ids=["by the plan", "by the policy"])
def test_the_links_have_the_shares_that_stand_in_the_log_and_these_are_the_whole_band(policy: Policy) -> None:
    kept, air = Kept(), SimulatedAir(SNR_HZ_WN)
    session = session_of(policy, air, split="optimal", recorder=kept)
    in_force = []
    for routing in routings(12):
        play(session, routing)
        in_force.append(air.share_N)
    session.settle()
    assert [share_N.sum() for share_N in asked_shares(kept)] == pytest.approx([1] * 12)
    for asked_N, share_N in zip(asked_shares(kept), in_force, strict=True):
        np.testing.assert_allclose(asked_N, share_N)
    assert len({tuple(share_N) for share_N in in_force}) > 6, "shares follow the loads"


def test_a_policys_own_shares_come_before_the_plans() -> None:
    air = SimulatedAir(SNR_HZ_WN)
    own_N = np.array([0.4, 0.3, 0.2, 0.1])
    play(session_of(Answering(bandwidth_share_N=own_N), air, split="optimal"), routings(1)[0])
    assert air.share_N.tolist() == own_N.tolist()


def test_a_prompt_begins_with_the_even_split_under_which_times_are_what_they_are() -> None:
    air = SimulatedAir(SNR_HZ_WN)
    session = session_of(TopK(), air, split="optimal")
    for routing in routings(4):
        play(session, routing)
    assert air.air_ratio_WN is not None
    session.begin_prompt(1, 5.0)
    assert air.share_N.tolist() == [0.25] * DEVICES
    assert air.air_ratio_WN is None
    assert (session.prompt, air.dilation) == (1, 5.0)


def test_shares_change_no_output() -> None:
    even, optimal = (session_of(TopK(), split=split) for split in ("even", "optimal"))
    for routing in routings(4):
        np.testing.assert_array_equal(play(even, routing)[2], play(optimal, routing)[2])


def even_split_error(session: Session, air: SimulatedAir) -> float:
    """The largest relative error of what is believed of a row on the air at the even split."""
    row_s_WN = session._learning.estimates.air_row_s_WN()
    return float(np.abs(row_s_WN / air.even_row_s_WN() - 1).max())


@pytest.mark.parametrize("source", ["estimated", "reported"])
@pytest.mark.parametrize("delay_s", [0.0, 2e-3])
@pytest.mark.parametrize("split", ["optimal", "proportional"])
def test_what_is_learnt_under_changing_shares_is_what_holds_at_the_even_split(
    source: str, delay_s: float, split: str
) -> None:
    air = SimulatedAir(SNR_HZ_WN, delay_s)
    csi: Csi = EstimatedCsi(BAND_HZ, DEVICES, 8 * ROW_BYTES, 8 * ROW_BYTES)
    if source == "reported":
        csi = ReportedCsi(BAND_HZ, DEVICES, 8 * ROW_BYTES, 8 * ROW_BYTES)
        csi.report(SNR_HZ_WN)
    session = session_of(TopK(), air, csi=csi, split=split)
    for routing in routings(60):
        play(session, routing)
    assert even_split_error(session, air) < 0.05
    cost_s_N = session.state().cost_s_N(np.full(DEVICES, 10), np.ones(DEVICES, int))
    true_s_N = 2 * delay_s + 10 * ROW_COMPUTE_S + (10 + HEADER_BYTES / ROW_BYTES) * air.even_row_s_WN().sum(axis=0)
    assert cost_s_N == pytest.approx(true_s_N, rel=0.05)


@pytest.mark.parametrize("source", ["estimated", "reported"])
def test_links_that_changed_are_known_at_once_only_where_devices_report_them(source: str) -> None:
    air, csi = SimulatedAir(SNR_HZ_WN), ReportedCsi(BAND_HZ, DEVICES, 8 * ROW_BYTES, 8 * ROW_BYTES)
    csi.report(SNR_HZ_WN)
    session = session_of(TopK(), air, csi=csi if source == "reported" else None)
    for routing in routings(20):
        play(session, routing)
    air.snr_hz_WN = SNR_HZ_WN / 20
    csi.report(air.snr_hz_WN)
    state = session.state()
    assert state.air is not None
    true_row_s_N = air.even_row_s_WN().sum(axis=0) + ROW_COMPUTE_S
    assert np.allclose(state.row_s_N, true_row_s_N, rtol=0.05) == (source == "reported")
    assert np.allclose(state.air.row_s_WN, air.even_row_s_WN(), rtol=0.05) == (source == "reported")
    assert (state.token_s_N >= state.row_s_N).all()


@pytest.mark.parametrize("delay_s", [0.0, 2e-3])
def test_what_is_predicted_of_a_block_holds_under_the_shares_it_gets(delay_s: float) -> None:
    air, kept = SimulatedAir(SNR_HZ_WN, delay_s), Kept()
    session = session_of(TopK(), air, split="optimal", recorder=kept)
    error_s = []
    for number, routing in enumerate(routings(60)):
        state, selection, _ = play(session, routing)
        if number >= 30:
            rows_N = np.bincount(selection.device_TK.ravel(), minlength=DEVICES)
            assert state.air is not None
            predicted_s_N = device_times_s(rows_N, (rows_N > 0).astype(int), state, air.share_N)
            true_s_N = [(o.bs_received_ns - o.bs_sent_ns) / 1e9 for o in air.outcomes]  # type: ignore[operator]
            error_s.append(np.abs(predicted_s_N[rows_N > 0] / true_s_N - 1).max())
    session.settle()
    assert np.median(error_s) < 0.05
    for way in ("down", "up"):
        log = {
            name: np.array([r[name] for r in kept.rounds[30:]]) for name in (f"predicted_{way}_s", f"{way}_ns", "rows")
        }
        sent = log["rows"] > 0
        assert np.median(np.abs(log[f"predicted_{way}_s"] * 1e9 / log[f"{way}_ns"] - 1)[sent]) < 0.05


def test_the_log_tells_the_rates_that_were_asked_for_and_measured() -> None:
    air, kept = SimulatedAir(SNR_HZ_WN), Kept()
    csi = ReportedCsi(BAND_HZ, DEVICES, 8 * ROW_BYTES, 8 * ROW_BYTES)
    csi.report(SNR_HZ_WN)
    session = session_of(TopK(), air, csi=csi, split="optimal", recorder=kept)
    session.begin_prompt(0, 5.0)
    for routing in routings(10):
        play(session, routing)
    session.settle()
    for rounds in kept.rounds:
        sent_N = rounds["rows"] > 0
        for way in ("down", "up"):
            asked_N, measured_N = (rounds[f"{what}_{way}_bits_per_s"] for what in ("asked", "measured"))
            assert measured_N[sent_N] == pytest.approx(asked_N[sent_N], rel=1e-3)
            assert np.isnan(measured_N[~sent_N]).all()
            assert (asked_N > 0).all()


# --- steering ---


class Watched(Steered):
    """Keeps what it is told."""

    def __init__(self, *args: Any) -> None:
        self.told: list[tuple[int, float, float]] = []
        super().__init__(*args)

    def observe(self, phase: int, block_s: float, dropped_mass: float) -> None:
        self.told.append((phase, block_s, dropped_mass))
        super().observe(phase, block_s, dropped_mass)


def test_a_steered_policy_hears_of_every_round_in_emulated_seconds_and_gate_mass() -> None:
    policy = Watched(LoadAware(), 1e-9)
    session = session_of(policy)
    session.begin_prompt(0, 10.0)
    spent = []
    for routing in routings(20):
        _, selection, _ = play(session, routing)
        gone_TK = selection.device_TK == DROPPED
        spent.append(routing.weight_TK[gone_TK].sum() / routing.weight_TK.sum())
    assert [phase for phase, _, _ in policy.told] == [GenerationPhase.PREFILL] * 20
    assert [mass for _, _, mass in policy.told] == pytest.approx(spent)
    assert max(spent) > 0, "a target that cannot be met asks for all there is"


def test_the_time_that_is_steered_by_is_the_rounds_without_dilation() -> None:
    policy, session = Watched(LoadAware(0.0), 1.0), session_of(TopK())
    session.policy = policy
    routing = routings(1)[0]
    session.begin_prompt(0, 8.0)
    state = session.state()
    selection = session.select(routing, state)
    times = RoundTimes(1_000_000_000, last_ns=5_000_000_000)
    session.finish(routing, state, selection, [], selection.weight_TK, times)
    assert policy.told == [(GenerationPhase.PREFILL, 0.5, 0.0)]


def test_prefill_and_decode_are_steered_apart() -> None:
    session = session_of(TopK())
    session.policy = policy = Watched(LoadAware(0.0), 1e-9)
    for routing in routings(10):
        play(session, routing)
    strength = policy.strength
    assert strength > 0
    session.phase = GenerationPhase.DECODE
    session.select(routings(1)[0], session.state())
    assert policy.strength == 0
    session.phase = GenerationPhase.PREFILL
    session.select(routings(1)[0], session.state())
    assert policy.strength == strength


def test_a_generous_target_leaves_the_model_unmodified() -> None:
    session = session_of(Steered(LoadAware(0.0), 1000.0))
    for routing in routings(20):
        _, selection, _ = play(session, routing)
        assert (selection.device_TK != DROPPED).all()


def test_a_quality_budget_is_spent_and_not_more_in_the_mean() -> None:
    policy = Watched(LoadAware(), None, 0.02)
    session = session_of(policy)
    for routing in routings(400):
        play(session, routing)
    assert np.mean([mass for _, _, mass in policy.told[100:]]) == pytest.approx(0.02, rel=0.25)


# --- answers that cannot be carried out ---


class Answering:
    """Everything where it belongs, but for what it is told to answer."""

    name = "own"
    params: Mapping[str, Any] = {}

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def select(self, routing: Routing, state: State) -> Selection:  # noqa: ARG002
        whole = finish(routing, routing.expert_TK)
        return Selection(**{"device_TK": whole.device_TK, "weight_TK": whole.weight_TK, **self._changes})


@pytest.mark.parametrize(
    "shares",
    [[0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0, 0], [float("nan"), 0.5, 0.25, 0.25], [[0.25] * 4]],
    ids=["too few", "too much", "negative", "unknown", "of another shape"],
)
def test_shares_that_do_not_split_the_band_are_refused_by_the_policys_name(shares: Sequence[Any]) -> None:
    session = session_of(Answering(bandwidth_share_N=np.array(shares)))
    with pytest.raises(ConfigError, match="policy own: bandwidth shares must be 4 numbers") as caught:
        session.select(routings(1)[0], session.state())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["device_TK", "weight_TK", "expert_TK"])
def test_answers_of_another_shape_are_refused_by_the_policys_name(name: str) -> None:
    session = session_of(Answering(**{name: np.zeros((TOKENS, TOP_K + 1), int)}))
    with pytest.raises(ConfigError, match="policy own: answers must have the shape of expert_TK"):
        session.select(routings(1)[0], session.state())
