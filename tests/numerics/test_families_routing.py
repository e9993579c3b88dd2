"""What a dropped and a replaced pair mean in every family, whatever its gate makes weights of."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from distributed_families import TOKEN_S_N, Told, distributed, layer_calls
from families import FAMILIES, SCORELESS, choosing_all, tiny_model
from numpy.typing import NDArray

from bs_node.model import plain_model
from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, Policy, Routing, Selection, State
from testbed.policies.substitute import Substitute
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR

pytestmark = [pytest.mark.torch]
THETA = 0.15
UNKNOWN_N = np.full(len(TOKEN_S_N), np.nan)
STATE = State(TOKEN_S_N, np.ones(len(TOKEN_S_N), bool), *[UNKNOWN_N] * 4)


class Family:
    """A family's checkpoint, and its model with the experts on nodes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        tiny_model(name).save_pretrained(folder / "model")
        self.plain = plain_model(folder / "model", "float32")
        self.model, self.session = distributed(folder / "model", folder / "split", TopK())

    def rounds(self, policy: Policy) -> list[tuple[Routing, Selection, Any, Any, Any]]:
        """Of each MoE layer in one forward: what the gate gave, what the policy answered, the plain model's experts,
        and what went into and came out of the distributed ones.
        """
        told = self.session.policy = Told(policy)
        calls = layer_calls(self.model)
        assert len(calls) == len(told.answers) > 0
        return [
            (routing, selection, self.plain.get_submodule(path), hidden_TD, out_TD)
            for (routing, selection), (path, (hidden_TD, _, _), out_TD) in zip(told.answers, calls, strict=True)
        ]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def old_sum(weight_TK: NDArray[Any], gate_TK: NDArray[Any]) -> NDArray[Any]:
    """The weights, scaled so that each token's sum is what the gate gave it."""
    weight_TK = weight_TK.astype(np.float64)
    return weight_TK * (gate_TK.astype(np.float64).sum(1) / weight_TK.sum(1))[:, None]


@torch.inference_mode()
def by_the_plain_model(experts: Any, hidden_TD: Any, expert_TK: Any, weight_TK: Any) -> Any:
    return experts(hidden_TD, torch.from_numpy(expert_TK), torch.from_numpy(weight_TK.astype(np.float32)))


def test_a_dropped_pair_keeps_the_tokens_old_sum_and_the_survivors_proportions(family: Family) -> None:
    dropped = 0
    for routing, selection, experts, hidden_TD, out_TD in family.rounds(WLR(theta=THETA)):
        kept_TK = selection.device_TK != DROPPED
        dropped += (~kept_TK).sum()
        expected_TK = old_sum(np.where(kept_TK, routing.weight_TK, 0), routing.weight_TK)
        np.testing.assert_allclose(selection.weight_TK, expected_TK, rtol=1e-5)
        plain_TD = by_the_plain_model(experts, hidden_TD, routing.expert_TK, expected_TK)
        torch.testing.assert_close(out_TD, plain_TD, rtol=1e-4, atol=1e-5)
    assert dropped > 0


@pytest.mark.parametrize(
    ("name", "score", "over_the_chosen"),
    [
        ("deepseek_v3", torch.sigmoid, True),
        ("minimax_m2", torch.sigmoid, True),
        ("lfm2_moe", torch.sigmoid, True),
        ("deepseek_v2", lambda logits_TE: logits_TE.softmax(-1), False),
    ],
)
def test_a_survivor_weighs_what_the_gates_formula_says_of_its_logits(
    name: str, score: Any, over_the_chosen: bool, tmp_path: Path
) -> None:
    """From the gate's logits alone: scale * s / sum of s over the survivors, or over the chosen where the gate does
    not divide. A bias and groups decide who is chosen and enter no weight.
    """
    family = Family(name, tmp_path)
    logits: list[Any] = []
    gates = [module for path, module in family.model.named_modules() if path.endswith((".gate", ".router"))]
    for gate in gates:
        gate.register_forward_hook(lambda _gate, _inputs, given: logits.append(given[0]))
    scale = getattr(family.model.config, "routed_scaling_factor", None) or 1.0
    rounds = family.rounds(WLR(theta=THETA))
    assert len(logits) == len(rounds)
    dropped = 0
    for logits_TE, (routing, selection, *_) in zip(logits, rounds, strict=True):
        score_TE = score(logits_TE.reshape(-1, logits_TE.shape[-1]).double()).numpy()
        score_TK = np.take_along_axis(score_TE, routing.expert_TK, 1)
        kept_TK = selection.device_TK != DROPPED
        dropped += (~kept_TK).sum()
        surviving_T1 = (score_TK * kept_TK).sum(1, keepdims=True)
        sum_T1 = np.ones_like(surviving_T1) if over_the_chosen else score_TK.sum(1, keepdims=True)
        np.testing.assert_allclose(selection.weight_TK, scale * sum_T1 * score_TK * kept_TK / surviving_T1, rtol=1e-4)
    assert dropped > 0


def test_the_ratio_is_of_the_gates_weights_and_no_scale_of_a_token_changes_it(family: Family) -> None:
    for routing, selection, *_ in family.rounds(WLR(theta=THETA)):
        ratio_TK = routing.weight_TK / TOKEN_S_N[routing.holds_NE.argmax(0)[routing.expert_TK]]
        kappa_TK = ratio_TK / (ratio_TK + ratio_TK.max(1, keepdims=True))
        np.testing.assert_array_equal(selection.device_TK == DROPPED, kappa_TK < THETA)
        scale_T1 = np.random.default_rng(0).uniform(0.01, 10, (len(ratio_TK), 1)).astype(np.float32)
        scaled = replace(routing, weight_TK=routing.weight_TK * scale_T1)
        again = WLR(theta=THETA).select(scaled, STATE)
        np.testing.assert_array_equal(again.device_TK, selection.device_TK)


def test_the_score_of_an_expert_is_what_it_weighs_once_all_are_chosen_or_there_is_none(family: Family) -> None:
    routing = family.rounds(TopK())[0][0]
    if family.name in SCORELESS:
        assert routing.score_TE is None
        return
    _, (_, expert_TE, weight_TE), _ = layer_calls(tiny_model(family.name, **choosing_all(family.name)))[0]
    expected_TE = np.zeros(weight_TE.shape)
    np.put_along_axis(expected_TE, expert_TE.numpy(), weight_TE.double().numpy(), 1)
    assert routing.score_TE is not None
    got_TE = routing.score_TE / routing.score_TE.sum(1, keepdims=True)
    np.testing.assert_allclose(got_TE, expected_TE / expected_TE.sum(1, keepdims=True), rtol=1e-4)


def test_a_substitute_weighs_its_score_and_is_refused_where_the_gate_tells_none(family: Family) -> None:
    policy = Substitute(budget=0.3, min_ratio=0.0)
    if family.name in SCORELESS:
        with pytest.raises(ConfigError, match="does not tell its score of the experts it did not choose"):
            family.rounds(policy)
        return
    replaced = 0
    for routing, selection, experts, hidden_TD, out_TD in family.rounds(policy):
        assert routing.score_TE is not None
        asked_TK = routing.expert_TK if selection.expert_TK is None else selection.expert_TK
        replaced += (asked_TK != routing.expert_TK).sum()
        expected_TK = old_sum(np.take_along_axis(routing.score_TE, asked_TK, 1), routing.weight_TK)
        np.testing.assert_allclose(selection.weight_TK, expected_TK, rtol=1e-4)
        plain_TD = by_the_plain_model(experts, hidden_TD, asked_TK, expected_TK)
        torch.testing.assert_close(out_TD, plain_TD, rtol=1e-4, atol=1e-5)
    assert replaced > 0
