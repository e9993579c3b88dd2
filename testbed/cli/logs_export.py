"""`testbed logs export`: a table of a run for another program."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, ForceOption, JsonOption, LogsOption, RunArgument, check_new_file

EXAMPLE = "Example: testbed logs export latest --table rounds --format csv --out rounds.csv"


class Table(str, Enum):
    ROUNDS = "rounds"
    TOKENS = "tokens"
    NODES = "nodes"
    EVENTS = "events"
    TELEMETRY = "telemetry"
    RUNS = "runs"


class Format(str, Enum):
    CSV = "csv"
    PARQUET = "parquet"
    JSON = "json"


OPTIONS = {
    Format.CSV: "FORMAT csv, HEADER",
    Format.PARQUET: "FORMAT parquet, COMPRESSION zstd",
    Format.JSON: "FORMAT json, ARRAY",
}


def command(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    run: RunArgument = "latest",
    table: Annotated[Table, typer.Option(help="What of the run.")] = Table.ROUNDS,
    file_format: Annotated[Format, typer.Option("--format", help="CSV, Parquet, or one JSON array.")] = Format.CSV,
    force: ForceOption = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Write a table of a run to a file. With the names of devices and policies; what is unknown stays empty."""
    from testbed.cli.output import console, print_json_line
    from testbed.errors import RunLogError
    from testbed.runlog.catalog import describe_run, find_run
    from testbed.runlog.query import LogDatabase
    from testbed.runlog.segment import new_file

    found = describe_run(find_run(run, logs))
    if found.problem:
        raise RunLogError(found.problem)
    check_new_file(out, force=force)
    with LogDatabase([found]) as database, new_file(out) as temporary:
        rows = database.copy(table.value, temporary, OPTIONS[file_format])
    if as_json:
        facts = {"run": found.run, "state": found.state.value, "table": table.value, "rows": rows}
        print_json_line({**facts, "format": file_format.value, "file": str(out)})
    else:
        console().print(f"{out}: {rows} rows of {table.value} of {found.run} ({found.state.value})", soft_wrap=True)
