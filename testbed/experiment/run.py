"""One run: every policy over the same text, logged, and summed up from the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from testbed.config import RunConfig
from testbed.errors import ConfigError, RunLogError
from testbed.experiment.results import IncompleteRunError, Results, summarise
from testbed.experiment.setup import add_facts, labels, standing_testbed
from testbed.experiment.workload import TEXT, choose
from testbed.fleet.boards import OnBoards
from testbed.policies.base import Policy
from testbed.policies.loading import make_policy
from testbed.policies.steering import SteerablePolicy, Steered
from testbed.runlog.catalog import write_results


def run_experiment(
    config: RunConfig,
    *,
    config_path: Path,
    out: Path | None,
    insecure: bool,
    display: Console,
    boards: OnBoards | None = None,
) -> Results:
    """Run what the run file asks for and return the table's figures, read back from the log.

    Of `boards`, where the devices are some, the log gets an event each, and what their links are.
    Raises IncompleteRunError, which has the results, where everything was run and the log could not take it all, and
    another WdmoeError for what a user can mend.
    """
    policies = make_policies(config)
    run_dir: Path | None = None
    problem: RunLogError | None = None
    try:
        with _measured(config, policies, config_path, out, insecure, display, boards) as run_dir:
            pass  # leaving it stops the nodes and closes the log
    except RunLogError as error:
        if run_dir is None:
            raise
        problem = error
    results = summarise(run_dir)
    try:
        write_results(run_dir, results.document())
    except RunLogError as error:
        problem = problem or error
    if problem is not None:
        raise IncompleteRunError(str(problem), results) from problem
    return results


@contextmanager
def _measured(
    config: RunConfig,
    policies: list[Policy],
    config_path: Path,
    out: Path | None,
    insecure: bool,
    display: Console,
    boards: OnBoards | None,
) -> Iterator[Path]:
    """The run's folder, once every policy was measured."""
    with (
        standing_testbed(config, policies, config_path=config_path, out=out, insecure=insecure) as (
            base_station,
            run_dir,
        ),
        progress_bar(display) as progress,
    ):
        if boards is not None:
            for name, facts in boards.told.items():
                base_station.recorder.event("board", device=name, **facts)
            if boards.links is not None:
                add_facts(run_dir, links=boards.links)
        from testbed.experiment.measuring import run_policy  # noqa: PLC0415 - torch is loaded while the nodes start

        work = config.workload
        workload = choose(
            base_station.token_ids,
            score=work.score_prompts,
            score_tokens=work.score_tokens,
            generate=work.generate_prompts if work.new_tokens else 0,
            prompt_tokens=work.prompt_tokens,
        )
        add_facts(run_dir, text_sha256=workload.text_sha256, text=TEXT)
        for index, name in enumerate(labels(config, policies)):
            run_policy(base_station, workload, work.new_tokens, index, name, progress)
        yield run_dir


def make_policies(config: RunConfig) -> list[Policy]:
    """The run file's policies, those with a strength steered where it asks for that. Raises ConfigError."""
    policies = [make_policy(spec.name, spec.params) for spec in config.policies]
    if not config.steering.wanted:
        return policies
    if not any(isinstance(policy, SteerablePolicy) for policy in policies):
        raise ConfigError("steering: no [[policy]] has a strength to steer; add wlr, load_aware or joint")
    target_ms = config.steering.target_ms
    target_s = None if target_ms is None else target_ms / 1e3
    return [
        Steered(policy, target_s, config.steering.quality_budget) if isinstance(policy, SteerablePolicy) else policy
        for policy in policies
    ]


@contextmanager
def progress_bar(display: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Calls (policy, done, total) become a bar on a terminal; nothing is drawn elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=display, disable=not display.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def show(policy: str, done: int, total: int) -> None:
            if policy not in tasks:
                tasks[policy] = progress.add_task(policy, total=total)
            progress.update(tasks[policy], completed=done)

        yield show
