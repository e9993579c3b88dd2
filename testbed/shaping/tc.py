"""One `tc` that stays open: a change is a write to its pipe instead of a process of several milliseconds."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress

from testbed.errors import ConfigError

ANSWERS_WITHIN_S = 5.0
READ_BYTES = 65536


class Tc:
    """Runs in the network namespace of the thread that makes it, and ends with its owner, however that ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["tc", "-batch", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the owner's to deal with
        )

    def run(self, lines: Iterable[str], *, until: str) -> str:
        """Run `lines`; what they answer up to a line that begins with `until`, which only the last may answer, once.

        tc does one after the other and writes each answer out at once, so by then all are done; what it adds is read
        with the next. Raises ConfigError, in tc's own words, where one failed, tc has ended, or 5 s have passed.
        """
        self._write("\n".join(lines) + "\n")
        deadline_s, said = time.monotonic() + ANSWERS_WITHIN_S, b""
        last = re.compile(rb"^" + re.escape(until.encode()) + rb".*\n", re.MULTILINE)
        while not last.search(said):
            more = self._read(deadline_s)
            if not more:
                raise ConfigError(f"rate shaping: {self._reason(said)}")
            said += more
        return said.decode()

    def _write(self, text: str) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):  # its end is told where its answer is missing
                self._process.stdin.write(text.encode())
                self._process.stdin.flush()

    def _read(self, deadline_s: float) -> bytes:
        """What it says next; nothing where it ended, or is silent for too long."""
        if self._process.stdout is None:
            return b""
        descriptor = self._process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], max(deadline_s - time.monotonic(), 0))
        return os.read(descriptor, READ_BYTES) if ready else b""

    def _reason(self, said: bytes) -> str:
        words = " ".join(line.strip() for line in said.decode(errors="replace").splitlines() if line.strip())
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.5)
            return f"tc ended with exit code {code}: {words[:300] or 'it gave no reason'}: mend that and start again"
        return f"tc has not answered for {ANSWERS_WITHIN_S:g} s: look for another program that changes this interface"

    def close(self) -> None:
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(ANSWERS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
