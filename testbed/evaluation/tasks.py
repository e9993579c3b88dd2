"""From the names of tasks to what lm-evaluation-harness runs, or one line about why it cannot."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.errors import ConfigError
from testbed.evaluation.items import STDLIB
from testbed.evaluation.make_tasks import cached_tasks

FEWSHOT_SEED = 1234  # lm-evaluation-harness's own
QUIET = ("lm_eval", "huggingface_hub", "datasets", "httpx2")


@dataclass(frozen=True, slots=True)
class Unit:
    """What a row of the table is about: a task, or a group such as `mmlu` with all its tasks."""

    name: str
    loaded: Any  # lm_eval's TaskDict: its tasks, groups and which is in which


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of every policy."""

    units: Sequence[Unit]
    limit: int | None = None  # items of each task
    batch_size: int = 1  # sequences in one call of the model
    allow_code: bool = False  # to run what the model wrote, where a task does


def load_units(
    names: Sequence[str], include: Path | None = None, shots: int | None = None, *, allow_code: bool = False
) -> list[Unit]:
    """Tasks and groups in the order asked for; a tag stands for its tasks. `include`: a folder of task files of yours.

    Names that begin with `stdlib` are the offline tasks, and what is found without lm-evaluation-harness's own tasks
    is loaded without looking at those. `allow_code`: tasks that run what the model wrote. Raises ConfigError, one line.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (an extra)

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not names:
        raise ConfigError("--tasks: is empty; name tasks of lm-evaluation-harness, or stdlib")
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include {include}: no such folder; name one with task files (YAML)")
    folders: list[str | Path] = [] if include is None else [include]
    if any(name.startswith(STDLIB) for name in names):
        folders.append(cached_tasks())
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(name in manager.all_tasks or name.startswith(STDLIB) for name in names):
        manager = TaskManager(include_path=folders)  # seconds: there are thousands
    units = [unit for name in names for unit in _load(manager, name)]
    _refuse_what_comes_twice(units)
    for unit in units:
        for name, task in unit.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not allow_code:
                raise ConfigError(f"--tasks {name}: runs code that the model wrote; add --run-code if that is wanted")
            asked = task.get_config("num_fewshot")
            if asked is None or (shots is not None and asked != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return units


def _load(manager: Any, name: str) -> list[Unit]:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f'did you mean "{near[0]}"?' if near else "`lm-eval ls tasks` lists them; offline: --tasks stdlib"
        raise ConfigError(f"--tasks {name}: no such task; {hint}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # a task is foreign code and foreign data
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        hint = "its data set comes from the network, once: connect this machine, or try --tasks stdlib"
        if not isinstance(error, OSError):
            hint = "lm-evaluation-harness says what the task needs beside its page"
        raise ConfigError(f"--tasks {name}: cannot be loaded ({why}); {hint}") from error
    if name in loaded["groups"]:
        return [Unit(name, loaded)]
    return [Unit(task, {"tasks": {task: it}, "groups": {}, "group_map": {}}) for task, it in loaded["tasks"].items()]


def _refuse_what_comes_twice(units: Sequence[Unit]) -> None:
    seen: set[str] = set()
    for unit in units:
        for task in unit.loaded["tasks"]:
            if task in seen:
                raise ConfigError(f"--tasks: {task} is asked for twice; leave one out")
            seen.add(task)
