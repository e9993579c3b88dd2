"""`testbed logs recover`: finish what a crash left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption

if TYPE_CHECKING:
    from testbed.errors import RunLogError

EXAMPLE = "Example: testbed logs recover latest"


def command(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="A run; default: every one that was killed.")] = None,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Finish what a crash left. Rows of killed runs are sealed into Parquet; one that is still recorded is refused."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.errors import RunLogError
    from testbed.runlog.catalog import find_run, list_runs
    from testbed.runlog.schema import TABLES

    folders = [find_run(run, logs)] if run is not None else _killed([found.directory for found in list_runs(logs)])
    outcomes = [_recover(run_dir) for run_dir in folders]
    recovered = [outcome for outcome in outcomes if not isinstance(outcome, RunLogError)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, RunLogError)]
    if as_json:
        print_json_line({"recovered": recovered, "failed": [str(error) for error in failed]})
    elif recovered:
        rows = [[found["run"], *(_count(found[name]) for name in (*TABLES, "lost"))] for found in recovered]
        heads = ["run", *TABLES, "lost on a full disk"]
        console().print(table("Rows recovered", heads, rows))
    elif not failed:
        console().print(f"nothing to recover in {logs}", soft_wrap=True)
    for error in failed[1:]:
        console(stderr=True).print(str(error), soft_wrap=True)
    if failed:
        raise failed[0]


def _count(rows: int | None) -> str:
    return "unknown" if rows is None else str(rows)


def _killed(folders: list[Path]) -> list[Path]:
    from testbed.runlog.catalog import is_recorded
    from testbed.runlog.schema import SEGMENT

    return [folder for folder in folders if any(folder.glob(f"*{SEGMENT}*")) and not is_recorded(folder)]


def _recover(run_dir: Path) -> dict[str, Any] | RunLogError:
    """The run, its rows per table that were in segments and are in Parquet now, and those of them that a full disk did
    not take; or why it cannot be recovered."""
    from testbed.errors import RunLogError
    from testbed.runlog.collect import collect_what_is_there
    from testbed.runlog.schema import SEGMENT, TABLES
    from testbed.runlog.seal import seal_run
    from testbed.runlog.segment import read_segment

    def counts(path: Path) -> tuple[int, int | None]:
        segment = read_segment(path)  # not kept: while it is open, deleting it frees no room on the disk
        return len(segment.records), segment.header["lost_rows"]

    try:
        found = {table: [counts(path) for path in run_dir.glob(f"{table}-*{SEGMENT}")] for table in TABLES}
        seal_run(run_dir)
        collect_what_is_there(run_dir)
    except RunLogError as error:
        return error
    rows = {table: sum(rows for rows, _ in parts) for table, parts in found.items()}
    lost = [lost for parts in found.values() for _, lost in parts]
    return {"run": run_dir.name, **rows, "lost": None if None in lost else sum(filter(None, lost))}
