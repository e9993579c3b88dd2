"""Lines from a terminal or a pipe, while something else must be done every now and then."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType

LOOK_EVERY_S = 0.1
READ_BYTES = 65_536


class Interrupts:
    """Ctrl-C, told when asked for; one that nobody asked about until the next comes raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True

    def taken(self) -> bool:
        came, self._came = self._came, False
        return came


class Lines:
    """Reads standard input. `meanwhile` is called about every 100 ms while nobody types."""

    def __init__(self, meanwhile: Callable[[], None], interrupts: Interrupts) -> None:
        self._meanwhile, self._interrupts = meanwhile, interrupts
        self._read, self._ended = b"", sys.stdin is None  # closed before we began
        self.interactive = sys.stdin is not None and sys.stdin.isatty()

    def next(self, invitation: str) -> str | None:
        """The next line, without its end; None after the last one. A terminal is shown the invitation.

        Ctrl-C forgets what was typed on a terminal, and raises KeyboardInterrupt elsewhere.
        """
        if self.interactive:
            print(invitation, end="", flush=True)
        while b"\n" not in self._read and not self._ended:
            self._wait()
            if self._interrupts.taken():
                if not self.interactive:
                    raise KeyboardInterrupt
                print(f"\n(Ctrl-D ends)\n{invitation}", end="", flush=True)
        line, separator, self._read = self._read.partition(b"\n")
        return line.decode(errors="replace") if line or separator else None

    def _wait(self) -> None:
        if not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:
            self._meanwhile()
            return
        read = os.read(sys.stdin.fileno(), READ_BYTES)
        self._ended = not read
        self._read += read
