"""Which of many trade-offs are not beaten by another one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(x: ArrayLike, y: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other beats: none is as small in both x and y and smaller in one of them.

    x, y: figures of the same points, smaller is better, in any units. Points that are equal are on the front together;
    one whose x or y is unknown (NaN) or infinite is not on it, and beats none. Raises ValueError for unequal lengths.
    """
    points = np.column_stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    front = np.zeros(len(points), dtype=np.bool_)
    known = np.isfinite(points).all(axis=1)
    if known.any():  # sorted by x, then y: a point is beaten where one before it has as small a y
        ordered, place = np.unique(points[known], axis=0, return_inverse=True)
        least_before = np.concatenate([[np.inf], np.minimum.accumulate(ordered[:-1, 1])])
        front[known] = (ordered[:, 1] < least_before)[place.reshape(-1)]
    return front
