"""A thread beside the one that records: what may wait for the disk is done here, so that no round does."""

from __future__ import annotations

import threading
from collections.abc import Callable

KEEP_EVERY_S = 0.5  # a power cut loses at most the rows of this time and of one write to the disk: a second in all


class Keeper:
    """Calls `work` every half second, at once when woken, and never again after `stop`. It must not raise."""

    def __init__(self, work: Callable[[], None], every_s: float = KEEP_EVERY_S) -> None:
        self._work, self._every_s, self._ended = work, every_s, False
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run log", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._due.set()

    def stop(self) -> None:
        """Wait until the work under way is done; a second call does nothing."""
        self._ended = True
        self._due.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._due.wait(self._every_s)
            self._due.clear()
            if self._ended:
                return
            self._work()
