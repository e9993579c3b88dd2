"""Commands on boards over ssh, all boards at once: OpenSSH's client, without any question asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import IO

from testbed.errors import ConfigError
from testbed.fleet.inventory import Board

CONNECT_S = 5
MOST_AT_ONCE = 32
MOST_BYTES = 1 << 20
SSH_FAILED = 255  # what ssh itself ends with where it could not connect


@dataclass(frozen=True)
class Answer:
    """What a board said. `code` is None where it did not end in time."""

    board: Board
    code: int | None
    out: str
    error: str  # the last line of stderr, or why there is no answer

    @property
    def good(self) -> bool:
        return self.code == 0

    @property
    def reached(self) -> bool:
        return self.code not in (None, SSH_FAILED)


def ssh_command(board: Board) -> list[str]:
    """The command line up to what is to be run there."""
    options = [f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=5", "ServerAliveCountMax=2", "LogLevel=ERROR"]
    command = ["ssh", "-T", "-o", "BatchMode=yes", *(part for option in options for part in ("-o", option))]
    if board.key is not None:
        command += ["-i", str(board.key)]
    if board.port is not None:
        command += ["-p", str(board.port)]
    command += board.ssh_arguments
    return [*command, "--", board.address if board.user is None else f"{board.user}@{board.address}"]


def ask(board: Board, script: str, timeout_s: float = 30.0) -> Answer:
    """Run a script of /bin/sh on a board and wait for it, and for no more of what it says than 1 MiB."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        given.write(script.encode())
        given.seek(0)
        process = subprocess.Popen(
            [*ssh_command(board), "sh", "-s"], stdin=given, stdout=out, stderr=err, start_new_session=True
        )
        code: int | None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = _beginning(err).strip().splitlines()
        error = f"no answer within {timeout_s:g} s" if code is None else said[-1] if said else ""
        return Answer(board, code, _beginning(out), error)


def ask_all(
    boards: Sequence[Board], script: str, timeout_s: float = 30.0, heard: Callable[[Answer], None] = lambda _: None
) -> list[Answer]:
    """Ask all boards at once. `heard` is told of each answer as it comes; the result is in the boards' order."""
    if shutil.which("ssh") is None:
        raise ConfigError("testbed fleet: ssh is missing: install the package openssh-client")
    answers: dict[str, Answer] = {}
    with ThreadPoolExecutor(min(MOST_AT_ONCE, max(1, len(boards)))) as pool:
        for done in as_completed([pool.submit(ask, board, script, timeout_s) for board in boards]):
            answers[done.result().board.name] = done.result()
            heard(done.result())
    return [answers[board.name] for board in boards]


def _beginning(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MOST_BYTES).decode(errors="replace")
