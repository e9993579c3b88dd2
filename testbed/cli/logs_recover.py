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
        rows = [[found["run"], *(_count(found[name]) for name in (*TABLES, "lost", "missing"))] for found in recovered]
        heads = ["run", *TABLES, "lost on\na full disk", "missing after\na power cut"]
        console().print(table("Rows recovered", heads, rows))
    elif not failed:
        console().print(f"nothing to recover in {logs}", soft_wrap=True)
    for line in [*filter(None, map(_missing, recovered)), *map(str, failed[1:])]:
        console(stderr=True).print(line, soft_wrap=True)
    if failed:
        raise failed[0]


def _count(rows: int | None) -> str:
    return "unknown" if rows is None else str(rows)


def _missing(outcome: dict[str, Any]) -> str | None:
    if not outcome["missing"]:
        return None
    rest = f"; what is left of them stays in {', '.join(outcome['damaged'])}" if outcome["damaged"] else ""
    return f"{outcome['run']}: {outcome['missing']} rows did not reach the disk whole and are missing{rest}"


def _killed(folders: list[Path]) -> list[Path]:
    from testbed.runlog.catalog import is_recorded
    from testbed.runlog.schema import SEGMENT

    return [folder for folder in folders if any(folder.glob(f"*{SEGMENT}*")) and not is_recorded(folder)]


def _recover(run_dir: Path) -> dict[str, Any] | RunLogError:
    """The run, its rows per table that were in segments and are in Parquet now, how many a full disk or a power cut
    took of all its rows, and segments that are kept for what is left of these; or why it cannot be recovered."""
    from testbed.errors import RunLogError
    from testbed.runlog.catalog import describe_run
    from testbed.runlog.collect import collect_what_is_there
    from testbed.runlog.schema import TABLES
    from testbed.runlog.seal import seal_run

    try:
        sealed = seal_run(run_dir)
        collect_what_is_there(run_dir)
    except RunLogError as error:
        return error
    rows = {table: sum(part.rows for part in sealed if part.table == table) for table in TABLES}
    losses = describe_run(run_dir).losses
    return {
        "run": run_dir.name,
        **rows,
        "lost": None if losses is None else losses.full_disk,
        "missing": 0 if losses is None else losses.missing,
        "damaged": [part.damaged.name for part in sealed if part.damaged is not None],
    }
