"""One run: every policy over the same text, logged, and summed up from the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.experiment.results import Results, summarise
from testbed.experiment.setup import labels, standing_testbed
from testbed.policies.base import Policy
from testbed.policies.loading import make_policy
from testbed.policies.steering import SteerablePolicy, Steered
from testbed.runlog.catalog import write_results


def run_experiment(
    config: RunConfig, *, config_path: Path, out: Path | None, insecure: bool, display: Console
) -> Results:
    """Run what the run file asks for and return the table's figures, read back from the log.

    Raises WdmoeError for what a user can mend.
    """
    policies = make_policies(config)
    with (
        standing_testbed(config, policies, config_path=config_path, out=out, insecure=insecure) as (
            base_station,
            run_dir,
        ),
        progress_bar(display) as progress,
    ):
        for index, (policy, name) in enumerate(zip(policies, labels(config, policies), strict=True)):
            base_station.run_policy(index, policy, name, progress)
    results = summarise(run_dir)
    write_results(run_dir, results.document())
    return results


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
