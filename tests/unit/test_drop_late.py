from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from testbed.errors import ConfigError
from testbed.policies.base import Deadline, Policy, Routing, State
from testbed.policies.drop_late import DropLate
from testbed.policies.loading import label, make_policy
from testbed.policies.topk import TopK

DEVICES = 4


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Routing, State]:
    tokens, k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    routing = Routing(
        layer=0,
        expert_TK=draw(hnp.arrays(np.int64, (tokens, k), elements=st.integers(0, 5))),
        weight_TK=draw(hnp.arrays(np.float32, (tokens, k), elements=st.floats(0, 1, width=32))),
        holds_NE=draw(hnp.arrays(bool, (DEVICES, 5))),
    )
    token_s_N = draw(hnp.arrays(np.float64, DEVICES, elements=st.floats(1e-4, 10) | st.just(math.nan)))
    nothing_N = np.zeros(DEVICES)
    available_N = draw(hnp.arrays(bool, DEVICES))
    return routing, State(token_s_N, available_N, nothing_N, nothing_N, nothing_N, token_s_N)


@given(rounds())
def test_everyone_is_asked_whom_topk_asks(case: tuple[Routing, State]) -> None:
    late, topk = DropLate(k_min=2, after_s=0.5).select(*case), TopK().select(*case)
    np.testing.assert_array_equal(late.device_TK, topk.device_TK)
    assert late.weight_TK.tobytes() == topk.weight_TK.tobytes()
    assert late.deadline == Deadline(2, 0.5)
    assert topk.deadline is None


def test_it_is_a_policy_that_the_run_file_can_name() -> None:
    policy = make_policy("drop_late", {"k_min": 2, "after_s": 1})
    assert isinstance(policy, Policy)
    assert policy.params == {"k_min": 2, "after_s": 1.0}
    assert label(policy.name, policy.params) == "drop_late k_min=2 after_s=1.0"


def test_by_default_one_answer_per_token_is_waited_for() -> None:
    assert make_policy("drop_late", {}).params["k_min"] == 1


@pytest.mark.parametrize("k_min", [0, -1, 1.5, 2.0, True, "2", None])
def test_an_impossible_k_min_is_refused_in_one_line(k_min: Any) -> None:
    with pytest.raises(ConfigError, match=r"^policy drop_late: k_min must be a whole number above 0, not .*$"):
        make_policy("drop_late", {"k_min": k_min})


@pytest.mark.parametrize("after_s", [-0.1, math.inf, math.nan, 1e6, True, "1", None])
def test_an_impossible_time_is_refused_in_one_line(after_s: Any) -> None:
    with pytest.raises(ConfigError, match=r"^policy drop_late: after_s must be seconds from 0 up, not .*$"):
        make_policy("drop_late", {"after_s": after_s})


def test_a_mistyped_parameter_is_named() -> None:
    with pytest.raises(ConfigError, match=r'no parameter "after" \(did you mean "after_s"\?\)'):
        make_policy("drop_late", {"after": 1})
