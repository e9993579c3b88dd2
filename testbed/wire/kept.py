"""Memory that is kept from block to block, so that a large one does not cost fresh pages each time."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", bound=np.generic)


class KeptRows(Generic[Value]):
    """Room for one block. It grows to the largest that it has seen."""

    def __init__(self, dtype: type[Value]) -> None:
        self._flat: NDArray[Value] = np.zeros(0, dtype)
        self._taken: NDArray[Any] = self._flat.reshape(0, 0)

    def take(self, rows: int, width: int) -> NDArray[Value]:
        """Rows to write to, C-contiguous; what was taken before is no longer valid."""
        if self._taken.shape == (rows, width):  # as in most rounds
            return self._taken
        size = rows * width
        if self._flat.size < size:
            self._flat = np.zeros(size, self._flat.dtype)  # what travels as filler is never another program's memory
        self._taken = self._flat[:size].reshape(rows, width)
        return self._taken
