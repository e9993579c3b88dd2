"""What the checks read of a board: files below a root, and commands; bounded, for both may be cut or hostile."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

MOST_BYTES = 256 * 1024  # of a file, or of what a command says; the longest real one is nvpmodel.conf, some 30 KiB
MOST_ENTRIES = 256  # of a folder
MOST_LINKS = 40
COMMAND_S = 10.0
LONGEST_LINE = 200  # characters of an answer that a person is shown
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"  # a user's PATH over ssh may lack sbin


class Answer(NamedTuple):
    """What a command said."""

    code: int | None  # None: it did not start, or was stopped
    text: str  # stdout and stderr together; where code is None, why

    @property
    def good(self) -> bool:
        return self.code == 0

    @property
    def first_line(self) -> str:
        """What to tell a person of an answer that was not good."""
        lines = (line.strip() for line in self.text.splitlines())
        return next((line for line in lines if line), "it said nothing")[:LONGEST_LINE]


class Commands:
    """Runs commands without input, in the C locale, at most `timeout_s` and for at most MOST_BYTES of output.

    With `folder`, they are looked up there and nowhere else.
    """

    def __init__(self, folder: Path | None = None, *, timeout_s: float = COMMAND_S) -> None:
        self._path = str(folder.absolute()) if folder else f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}"
        self._timeout_s = timeout_s

    def run(self, name: str, *arguments: str, timeout_s: float | None = None) -> Answer:
        found = shutil.which(name, path=self._path)
        if found is None:
            return Answer(None, f"{name} is not installed")
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            process = subprocess.Popen(
                [found, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
                cwd="/",
                start_new_session=True,  # so that what it started ends with it
            )
        except (OSError, ValueError) as error:
            return Answer(None, f"{name} does not start: {error}")
        return _listen(process, name, limit_s)


class NoCommands(Commands):
    """For files of another machine: commands would answer for this one."""

    def run(self, name: str, *arguments: str, timeout_s: float | None = None) -> Answer:  # noqa: ARG002
        return Answer(None, f"{name} was not asked: files are read below another root")


class Machine:
    """A board: its files below `root`, whose links stay below it, and its commands."""

    def __init__(self, root: Path = Path("/"), commands: Commands | None = None) -> None:
        self._root, self._commands = root, commands or Commands()

    def run(self, name: str, *arguments: str, timeout_s: float | None = None) -> Answer:
        return self._commands.run(name, *arguments, timeout_s=timeout_s)

    def read(self, path: str, most_bytes: int = MOST_BYTES) -> bytes | None:
        """The first bytes of a file; None where it cannot be read. An unpowered sensor answers EAGAIN: None as well."""
        try:
            descriptor = os.open(self._below_root(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _read(descriptor, most_bytes)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def text(self, path: str, most_bytes: int = MOST_BYTES) -> str:
        """A file as text without control characters; empty where it cannot be read."""
        return clean(self.read(path, most_bytes) or b"")

    def number(self, path: str) -> int | None:
        text = self.text(path, 64).strip()
        return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None

    def names(self, folder: str) -> list[str]:
        """What is in a folder, in order; empty where there is no such folder."""
        try:
            with os.scandir(self._below_root(folder)) as entries:
                return sorted(entry.name for entry in islice(entries, MOST_ENTRIES))
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        try:
            return self._below_root(path).exists()
        except OSError:
            return False

    def _below_root(self, path: str) -> Path:
        """As chroot would resolve it: /etc/nvpmodel.conf is an absolute link on a board."""
        at, links = self._root, 0
        left = _parts(path)
        while left:
            part = left.pop()
            if part == "..":
                at = at if at == self._root else at.parent
                continue
            step = at / part
            if not step.is_symlink():
                at = step
                continue
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, "too many links", path)
            target = os.readlink(step)  # noqa: PTH115 - Path.readlink needs Python 3.9
            at = self._root if target.startswith("/") else at
            left += _parts(target)
        return at


def clean(raw: bytes) -> str:
    """Text that can be printed anywhere: what is not ASCII, and control characters but newline and tab, become `?`."""
    text = raw.decode("ascii", "replace")
    return "".join(letter if " " <= letter <= "~" or letter in "\n\t" else "?" for letter in text)


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _read(descriptor: int, most_bytes: int) -> bytes:
    got = b""
    while len(got) < most_bytes:
        chunk = os.read(descriptor, most_bytes - len(got))
        if not chunk:
            break
        got += chunk
    return got


def _listen(process: subprocess.Popen[bytes], name: str, limit_s: float) -> Answer:
    """Read until it ends, says too much or takes too long, and leave nothing of it running."""
    deadline_s = time.monotonic() + limit_s
    pipe = process.stdout
    if pipe is None:
        raise ValueError("the command must write to a pipe")
    try:
        got, ended = _read_until(pipe, deadline_s)
        if ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return Answer(process.wait(max(0.0, deadline_s - time.monotonic())), clean(got))
        if len(got) >= MOST_BYTES:
            return Answer(None, f"{name} said more than {MOST_BYTES // 1024} KiB")
        return Answer(None, f"{name} did not answer within {limit_s:g} s")
    finally:
        pipe.close()
        if process.returncode is None:
            _end(process)


def _read_until(pipe: IO[bytes], deadline_s: float) -> tuple[bytes, bool]:
    """What it said, and whether it closed its output."""
    got = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(got) < MOST_BYTES and selector.select(max(0.0, deadline_s - time.monotonic())):
            chunk = os.read(pipe.fileno(), 65536)
            if not chunk:
                return got, True
            got += chunk
    return got, False


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds does not die
        process.wait(1.0)
