"""The mark at the end of a record, the only write that makes it exist.

Its low half is the record's number, from 1 on; where marks are checked, its high half is a checksum of the rest of the
record: a power cut may keep the page with the mark and take the one before it. R records, W words of 8 bytes in each.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from testbed.runlog.columns import COMMIT

WORD = np.dtype("<u8")
NUMBER, CHECKSUM = np.uint64(0xFFFF_FFFF), np.uint64(0xFFFF_FFFF_0000_0000)

Words = NDArray[np.uint64]


def words_of(records: NDArray[np.void]) -> Words:
    """words_RW, the same memory."""
    words: Words = records.view(WORD).reshape(len(records), records.dtype.itemsize // WORD.itemsize)
    return words


def checked_marks(first: int, words_RW: Words) -> Words:
    """Marks of records `first`, `first` + 1, ...; what stands where they go plays no part."""
    marks: Words = np.arange(first, first + len(words_RW), dtype=np.uint64)
    checksum = words_RW @ _weights(words_RW.shape[1])
    checksum &= CHECKSUM
    marks |= checksum
    return marks


def numbered(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Records whose mark has their number."""
    there: NDArray[np.bool_] = (records[COMMIT] & NUMBER) == np.arange(1, len(records) + 1, dtype=np.uint64)
    return there


def whole(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Records whose mark has their number and the checksum of what stands before it."""
    there: NDArray[np.bool_] = records[COMMIT] == checked_marks(1, words_of(records))
    return there


@lru_cache
def _weights(words: int) -> Words:
    """One odd pseudo-random number (splitmix64) per word, 0 for the mark: a bit that flips changes the high half of
    their weighted sum."""
    mixed = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    mixed[-1] = 0
    return mixed
