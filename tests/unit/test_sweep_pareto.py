from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.sweep.pareto import pareto_front

few = st.integers(0, 5).map(float)  # so that many are equal
figure = few | st.floats(allow_nan=True, allow_infinity=True)
points = st.lists(st.tuples(figure, figure), max_size=30)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def is_known(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))


def front(given_points: list[tuple[float, float]]) -> list[bool]:
    x, y = zip(*given_points, strict=True) if given_points else ((), ())
    marks: list[bool] = pareto_front(x, y).tolist()
    return marks


@given(points)
def test_the_front_is_what_no_known_point_beats(given_points: list[tuple[float, float]]) -> None:
    known = list(filter(is_known, given_points))
    expected = [is_known(point) and not any(beats(other, point) for other in known) for point in given_points]
    assert front(given_points) == expected


@given(points, st.randoms())
def test_the_order_of_the_points_changes_nothing(given_points: list[tuple[float, float]], random: object) -> None:
    order = list(range(len(given_points)))
    random.shuffle(order)  # type: ignore[attr-defined]
    marks = front(given_points)
    assert front([given_points[i] for i in order]) == [marks[i] for i in order]


@given(st.lists(st.tuples(few, few), min_size=1, max_size=30))
def test_there_is_always_a_front_and_along_it_one_figure_falls_as_the_other_rises(
    given_points: list[tuple[float, float]],
) -> None:
    on_it = sorted({point for point, mark in zip(given_points, front(given_points), strict=True) if mark})
    assert on_it
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(on_it))


@given(st.lists(st.tuples(few, few), max_size=30))
def test_swapping_the_two_figures_or_their_units_changes_nothing(given_points: list[tuple[float, float]]) -> None:
    x, y = np.array(given_points).reshape(-1, 2).T
    assert (pareto_front(x, y) == pareto_front(1e3 * y, x + 7)).all()


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        pareto_front([1.0, 2.0], [1.0])
