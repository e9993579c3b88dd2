"""Intervals of accuracies and of their differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.evaluation.accuracy import mean_interval, paired_difference

right_or_wrong = st.lists(st.integers(0, 1), min_size=1, max_size=200)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_the_interval_of_right_and_wrong_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    found = mean_interval([1] * right + [0] * (count - right))
    assert found == pytest.approx((right / count, low, high), abs=1e-4)


@given(right_or_wrong)
def test_an_interval_holds_its_mean_and_stays_between_0_and_1(scores: list[int]) -> None:
    mean, low, high = mean_interval(scores)
    assert 0 <= low <= mean <= high <= 1


def test_scores_that_are_not_right_or_wrong_have_the_normal_interval() -> None:
    scores = np.linspace(0.2, 0.8, 101)
    mean, low, high = mean_interval(scores)
    half = 1.96 * scores.std(ddof=1) / math.sqrt(101)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)


def test_nothing_has_no_interval() -> None:
    assert all(map(math.isnan, mean_interval([])))


@given(right_or_wrong)
def test_the_same_scores_differ_by_exactly_0(scores: list[int]) -> None:
    found = paired_difference(scores, scores)
    assert (found.mean, found.gained, found.lost) == (0, 0, 0)
    assert len(scores) == 1 or (found.low, found.high) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=200))
def test_a_difference_is_what_was_gained_minus_what_was_lost(pairs: list[tuple[int, int]]) -> None:
    mine, reference = zip(*pairs, strict=True)
    found = paired_difference(mine, reference)
    assert found.mean == pytest.approx((found.gained - found.lost) / len(pairs))
    assert found.low <= found.mean + 1e-12
    assert found.mean <= found.high + 1e-12
    assert found == paired_difference(mine, reference), "the same every time"


def test_the_bootstrap_agrees_with_the_standard_error_of_paired_differences() -> None:
    difference = np.array([1] * 60 + [-1] * 90 + [0] * 850)
    found = paired_difference(difference, np.zeros(1000))
    half = 1.96 * difference.std() / math.sqrt(1000)
    assert (found.low, found.high) == pytest.approx((-0.03 - half, -0.03 + half), abs=0.002)


def test_scores_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1, 0], [1])
