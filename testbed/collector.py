"""Python's garbage collector, kept out of the way of rounds that take a millisecond."""

from __future__ import annotations

import gc

OBJECTS_BETWEEN_COLLECTIONS = 50_000  # a round makes a few hundred, nearly all of which go by themselves


def keep_what_is_loaded() -> None:
    """What is there now stays: no collection needs to look at it again, and those to come are rare."""
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
