"""Views of a table of fixed-width records: a column, or columns that lie side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.runlog.columns import span


class Views(dict[str, NDArray[Any]]):
    """By column name an array (records,), by "first:last" one (records, columns), for columns side by side in one
    format. Made when first asked for, and kept; raises ValueError for what the records do not have.
    """

    def __init__(self, records: NDArray[np.void]) -> None:
        super().__init__()
        self._records = records

    def __missing__(self, name: str) -> NDArray[Any]:
        fields = dict(self._records.dtype.fields or {})
        names = span(name, list(fields))
        view = self._records[names[0]]
        if len(names) > 1:
            there = [fields[each][:2] for each in names]
            first = there[0][1]
            if there != [(view.dtype, first + view.itemsize * place) for place in range(len(names))]:
                raise ValueError(f"{name}: these columns do not lie side by side in one format")
            view = np.lib.stride_tricks.as_strided(
                view, (len(view), len(names)), (view.strides[0], view.itemsize), writeable=True
            )
        self[name] = view
        return view
