"""`testbed logs prune`: make room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption

if TYPE_CHECKING:
    from testbed.runlog.catalog import Run

EXAMPLE = "Example: testbed logs prune --keep 20 --older-than 30 --yes"


def command(
    keep: Annotated[int | None, typer.Option(min=0, help="Keep so many of the newest.", show_default=False)] = None,
    older_than_days: Annotated[
        float | None,
        typer.Option("--older-than", min=0, metavar="DAYS", help="Keep what began within so many days."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete; without it nothing is, the table says what would.")
    ] = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Delete old runs. Those that neither --keep nor --older-than keeps; never one that runs, nor the sample."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.errors import ConfigError
    from testbed.runlog.catalog import list_runs

    if keep is None and older_than_days is None:
        raise ConfigError("logs prune: say what to keep, with --keep N or --older-than DAYS")
    chosen = to_delete(list_runs(logs), keep, older_than_days)
    if yes:
        for run in chosen:
            _delete(run)
    freed_mb = sum(run.size_bytes for run in chosen) / 1e6
    if as_json:
        facts = [{"run": run.run, "size_bytes": run.size_bytes} for run in chosen]
        print_json_line({"deleted": yes, "runs": facts, "megabytes": freed_mb})
        return
    if chosen:
        rows = [[run.run, run.state.value, f"{run.size_bytes / 1e6:.1f}"] for run in chosen]
        console().print(table("Deleted" if yes else "Would be deleted", ["run", "state", "MB"], rows))
    end = "." if yes or not chosen else "; --yes deletes them."
    console().print(f"{len(chosen)} runs, {freed_mb:.1f} MB{end}", soft_wrap=True)


def to_delete(runs: list[Run], keep: int | None, older_than_days: float | None) -> list[Run]:
    """Of `runs`, the oldest first, those that nothing keeps. Only what is named by the time it began may be deleted."""
    from datetime import datetime, timedelta, timezone

    from testbed.runlog.catalog import RUN_ID, State

    chosen = [run for run in runs if RUN_ID.fullmatch(run.run) and not run.directory.is_symlink()]
    if keep is not None:
        chosen = chosen[: max(0, len(chosen) - keep)]
    if older_than_days is not None:
        before = datetime.now(timezone.utc) - timedelta(days=older_than_days)
        chosen = [run for run in chosen if run.began is not None and run.began < before]
    return [run for run in chosen if run.state is not State.RUNNING]


def _delete(run: Run) -> None:
    """Held while it is deleted: nobody records into it or seals it."""
    import os
    import shutil

    from testbed.runlog.events import hold

    lock = hold(run.directory)
    try:
        shutil.rmtree(run.directory)
    finally:
        os.close(lock)
