"""Runs actions in processes of their own, each killed with SIGKILL right before its n-th step that touches a file."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEPS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (os, ("open", "close", "write", "pwrite", "posix_fallocate", "fsync", "ftruncate", "truncate")),
    (Path, ("rename", "unlink")),
    (io, ("open",)),
    (pq, ("write_table",)),
)
NEVER = 10**9
PATIENCE_S = 60

RunKilled = Callable[..., int]  # (step, name of a function of the module, its arguments) -> exit code


@contextmanager
def killed_runs(module: str) -> Iterator[RunKilled]:
    """Functions of a test module, run in forks of one fresh process that has imported it.

    The exit code is -SIGKILL, or 0 where the function took fewer steps than that.
    """
    command = [sys.executable, "-c", "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import kill_steps as k;"]
    command[-1] += "k.serve(sys.argv[2])"
    with subprocess.Popen(
        [*command, json.dumps(sys.path), module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asked, answers = server.stdin, server.stdout

        def run(step: int, function: str, *arguments: str | int) -> int:
            print(json.dumps([step, function, arguments]), file=asked, flush=True)
            return int(answers.readline())

        yield run
        asked.close()


def serve(module: str) -> None:
    actions = importlib.import_module(module)
    pa.array(np.zeros(1))  # has pyarrow look for pandas once instead of in every fork
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an action prints is no answer
    for line in sys.stdin:
        step, function, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE_S)
            _run(step, getattr(actions, function), arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _run(step: int, action: Callable[..., None], arguments: list[Any]) -> None:
    steps = count(1)

    def killed_before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for owner, names in STEPS:
        for name in names:
            setattr(owner, name, killed_before(getattr(owner, name)))
    try:
        action(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
