"""Where a policy asks other experts than the gate chose: the right sums, whoever answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_air import SimulatedAir, play
from splits import write_split

from bs_node.dispatcher import InProcessDispatcher
from bs_node.registry import Node
from bs_node.session import Session
from jetson_node.experts import ffn_numpy, make_experts
from testbed.checkpoint.ffn import FfnSpec
from testbed.latency.estimator import Estimator
from testbed.policies.base import DROPPED, Policy, Routing, Selection, State
from testbed.policies.selection import arrived_weights, dropped_share

SPEC, DEVICES, EXPERTS = FfnSpec(width=8, inner=12), ("a", "b", "c"), 3
HOLDS_NE = np.eye(3, dtype=bool)
EXPERT_TK, WEIGHT_TK = np.array([[0, 1], [1, 0], [0, 2]]), np.float32([[0.5, 0.25], [0.75, 0.125], [0.625, 0.25]])
ASKED_TK = np.array([[2, 1], [1, 0], [0, 1]])  # for token 0 expert 2 in place of 0, for token 2 expert 1 in place of 2
NEW_TK = np.float32([[0.25, 0.5], [0.75, 0.125], [0.5, 0.375]])


class Substituting:
    """Asks other experts, each on its own device, with weights of its own that keep each token's sum."""

    name = "own"
    params: Mapping[str, Any] = {}

    def select(self, routing: Routing, state: State) -> Selection:  # noqa: ARG002
        return Selection(ASKED_TK, NEW_TK, expert_TK=ASKED_TK)


def routing_of() -> Routing:
    return Routing(0, EXPERT_TK, WEIGHT_TK, HOLDS_NE)


def session_of(policy: Policy, dispatcher: Any) -> Session:
    nodes = [Node(n, name, routing_id=b"x", boot_id=n) for n, name in enumerate(DEVICES)]
    return Session(policy, dispatcher, Estimator(len(nodes), 100, 100), nodes)


def test_the_asked_experts_are_computed_with_the_policys_weights(tmp_path: Path) -> None:
    manifest, weights = write_split(tmp_path / "split", SPEC, devices=DEVICES, layers=1, experts=EXPERTS)
    experts = [make_experts(tmp_path / "split", manifest, name, backend="numpy") for name in DEVICES]
    session = session_of(Substituting(), InProcessDispatcher(experts))
    _, selection, out_TD = play(session, routing_of(), SPEC.width)
    one_1D = np.ones((1, SPEC.width), np.float32)
    y_ED = np.concatenate([ffn_numpy(one_1D, weights[0, expert], SPEC) for expert in range(EXPERTS)])
    np.testing.assert_allclose(out_TD, np.einsum("tk,tkd->td", NEW_TK, y_ED[ASKED_TK]), rtol=1e-5)
    assert dropped_share(routing_of(), selection) == pytest.approx((0.5 + 0.25) / WEIGHT_TK.sum())


@pytest.mark.parametrize("lost", range(3))
def test_when_a_device_is_lost_the_others_keep_each_tokens_sum(lost: int) -> None:
    arrived_TK = lost != ASKED_TK
    final_TK = arrived_weights(Selection(ASKED_TK, NEW_TK, expert_TK=ASKED_TK), arrived_TK)
    assert (final_TK[~arrived_TK] == 0).all()
    assert final_TK.sum(axis=1) == pytest.approx(np.where(arrived_TK.any(axis=1), NEW_TK.sum(axis=1), 0))
    whole_T = arrived_TK.all(axis=1)
    np.testing.assert_array_equal(final_TK[whole_T], NEW_TK[whole_T])


def test_what_a_policy_itself_dropped_is_not_made_up_for_twice() -> None:
    """Its weights already are the survivors'."""
    device_TK = np.array([[0, DROPPED], [1, 2]])
    selection = Selection(device_TK, np.float32([[0.75, 0.0], [0.5, 0.25]]))
    everything = arrived_weights(selection, device_TK != DROPPED)
    np.testing.assert_array_equal(everything, selection.weight_TK)
    without_2 = arrived_weights(selection, (device_TK != DROPPED) & (device_TK != 2))
    np.testing.assert_array_equal(without_2, np.float32([[0.75, 0.0], [0.75, 0.0]]))
    assert (arrived_weights(selection, np.zeros((2, 2), bool)) == 0).all()


@pytest.mark.torch
def test_what_is_left_of_a_lost_devices_tokens_is_added_up_with_their_sums() -> None:
    """Every device answers with twice what it got, so that a sum tells the weights."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bs_node.remote_experts import RemoteLayer, remote_experts

    air = SimulatedAir(np.full((2, 3), 1e8))
    session = session_of(Substituting(), air)
    module = torch.nn.Module()
    module.remote = RemoteLayer(0, HOLDS_NE, None, session)
    inputs = torch.ones(3, 4), torch.from_numpy(EXPERT_TK), torch.from_numpy(WEIGHT_TK)
    for lost in ([], [0], [1], [2], [1, 2], [0, 1, 2]):
        air.lost = set(lost)
        arrived_TK = ~np.isin(ASKED_TK, lost)
        expected_T = 2 * np.where(arrived_TK.any(axis=1), NEW_TK.sum(axis=1), 0)
        out_TD = remote_experts(module, *inputs).numpy()
        assert out_TD == pytest.approx(np.tile(expected_T[:, None], 4))
