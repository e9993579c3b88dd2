# ruff: noqa: E402 - what is imported below needs what importorskip has just found
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import FAMILIES, tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bs_node.gate import Gate
from bs_node.model import experts_of

pytestmark = pytest.mark.torch
PROMPT = torch.arange(3, 45).reshape(2, 21)


def catch(module: Any, hidden_TD: Any, expert_TK: Any, weight_TK: Any) -> Any:
    expert_TK, weight_TK = expert_TK.numpy(), weight_TK.float().numpy()
    module.caught.append((module.gate.scores(expert_TK, weight_TK), expert_TK, weight_TK))
    return torch.zeros_like(hidden_TD)


ALL_EXPERTS_FUNCTIONS.register("catch", catch)


@torch.inference_mode()
def caught_in(model: Any, prompts: list[Any]) -> list[tuple[Any, Any, Any]]:
    """(score_TE, expert_TK, weight_TK) of every MoE layer and forward."""
    model.set_experts_implementation("catch")
    caught: list[tuple[Any, Any, Any]] = []
    for path, module in experts_of(model).items():
        module.gate, module.caught = Gate.beside(model, path), caught
    for prompt in prompts:
        model(prompt)
    return caught


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phimoe"])
def test_a_chosen_experts_score_is_its_weight_and_every_other_expert_has_one(family: str) -> None:
    for score_TE, expert_TK, weight_TK in caught_in(tiny_model(family), [PROMPT, PROMPT[:1, :1]]):
        assert score_TE.shape == (len(expert_TK), 8)
        assert score_TE.dtype == np.float32
        assert (score_TE > 0).all()
        chosen_TK = np.take_along_axis(score_TE, expert_TK, 1)
        np.testing.assert_allclose(chosen_TK, weight_TK, rtol=2e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_experts_that_were_not_chosen_score_no_more_than_those_that_were(family: str) -> None:
    for score_TE, expert_TK, _ in caught_in(tiny_model(family), [PROMPT]):
        chosen_TK = np.take_along_axis(score_TE, expert_TK, 1)
        np.put_along_axis(score_TE, expert_TK, 0, 1)
        assert (score_TE.max(1) <= chosen_TK.min(1)).all()


def test_a_gate_of_two_separate_softmaxes_gives_no_scores() -> None:
    caught = caught_in(tiny_model("phimoe"), [PROMPT, PROMPT[:1, :1]])
    assert [scores for scores, _, _ in caught] == [None] * 6


def test_one_expert_per_token_is_enough_to_tell_the_rule() -> None:
    for score_TE, expert_TK, weight_TK in caught_in(
        tiny_model("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False), [PROMPT]
    ):
        np.testing.assert_allclose(np.take_along_axis(score_TE, expert_TK, 1), weight_TK, rtol=2e-5)


def test_weights_that_are_always_one_tell_nothing() -> None:
    model = tiny_model("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True)
    assert [scores for scores, _, _ in caught_in(model, [PROMPT])] == [None] * 3


def test_a_gate_in_bf16_is_held_to_what_bf16_can_say() -> None:
    for score_TE, expert_TK, weight_TK in caught_in(tiny_model("qwen3_moe", norm_topk_prob=True).bfloat16(), [PROMPT]):
        np.testing.assert_allclose(np.take_along_axis(score_TE, expert_TK, 1), weight_TK, rtol=2e-2)


def test_what_a_gate_gave_is_asked_for_once() -> None:
    model = tiny_model("mixtral")
    _, expert_TK, weight_TK = caught_in(model, [PROMPT])[-1]
    gate = next(iter(experts_of(model).values())).gate
    assert gate.scores(expert_TK, weight_TK) is None
