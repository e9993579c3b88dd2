from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.experiment.statistics import paired_cut_interval

SECONDS = st.floats(1e-3, 1e3)
PAIRS = st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=30)


@given(reference=st.lists(SECONDS, min_size=2, max_size=20), kept=st.floats(0.1, 2))
def test_where_every_pair_is_cut_alike_the_interval_is_that_cut(reference: list[float], kept: float) -> None:
    reference_P = np.array(reference)
    assert paired_cut_interval(kept * reference_P, reference_P, resamples=100) == pytest.approx((1 - kept,) * 3)


@given(pairs=PAIRS)
def test_the_cut_is_of_the_sums_and_the_interval_lies_between_the_least_and_the_greatest_pair(
    pairs: list[tuple[float, float]],
) -> None:
    sums_P, reference_P = np.array(pairs).T
    cut, low, high = paired_cut_interval(sums_P, reference_P, resamples=200)
    cuts_P = 1 - sums_P / reference_P
    assert cut == 1 - sums_P.sum() / reference_P.sum()
    assert cuts_P.min() - 1e-9 <= low <= high <= cuts_P.max() + 1e-9


@given(pairs=PAIRS, factor=st.floats(1e-3, 1e3))
def test_the_unit_of_the_sums_does_not_matter(pairs: list[tuple[float, float]], factor: float) -> None:
    sums_P, reference_P = np.array(pairs).T
    scaled = paired_cut_interval(factor * sums_P, factor * reference_P, resamples=50)
    assert scaled == pytest.approx(paired_cut_interval(sums_P, reference_P, resamples=50), abs=1e-9)


def test_the_same_seed_gives_the_same_interval_however_many_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    reference_P = rng.uniform(1, 2, 40)
    sums_P = reference_P * rng.uniform(0.5, 1, 40)
    at_once = paired_cut_interval(sums_P, reference_P, seed=3)
    monkeypatch.setattr("testbed.experiment.statistics.AT_ONCE", 100)
    assert paired_cut_interval(sums_P, reference_P, seed=3) == at_once
    assert paired_cut_interval(sums_P, reference_P, seed=4) != at_once


def test_of_many_pairs_the_interval_is_the_normal_one_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    reference_P = rng.uniform(5, 15, 2000)
    sums_P = reference_P * rng.uniform(0.6, 0.9, 2000)
    cut, low, high = paired_cut_interval(sums_P, reference_P)
    rest_P = sums_P - (1 - cut) * reference_P
    half = 1.96 * rest_P.std() / reference_P.mean() / math.sqrt(2000)
    assert (cut - low, high - cut) == pytest.approx((half, half), rel=0.05)


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(0)
    reference_P = rng.uniform(1, 100, 50)
    sums_P = 0.8 * reference_P + rng.uniform(0, 0.1, 50)
    _, low, high = paired_cut_interval(sums_P, reference_P)
    _, low_apart, high_apart = paired_cut_interval(sums_P, rng.permutation(reference_P))
    assert high - low < 0.1 * (high_apart - low_apart)


def test_one_pair_has_a_cut_and_no_interval() -> None:
    cut, low, high = paired_cut_interval(np.array([3.0]), np.array([4.0]))
    assert cut == 0.25
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("reference", [[], [math.nan, 1.0]])
def test_what_is_unknown_stays_unknown(reference: list[float]) -> None:
    assert all(math.isnan(value) for value in paired_cut_interval(np.array(reference), np.array(reference)))


@pytest.mark.parametrize(("sums", "reference"), [([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]]), ([0.0], [0.0])])
def test_what_does_not_pair_up_or_has_nothing_to_cut_is_refused(sums: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs|above 0"):
        paired_cut_interval(np.array(sums), np.array(reference))
