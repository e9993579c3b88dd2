"""`testbed logs query`: SQL over the rows of runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption

if TYPE_CHECKING:
    from testbed.runlog.query import Answer

EXAMPLE = (
    "Example: testbed logs query --run latest 'SELECT device_name, avg(rtt_ns / dilation) / 1e6 AS ms FROM rounds "
    "WHERE rows > 0 GROUP BY ALL ORDER BY ms DESC'"
)


def command(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT or DESCRIBE, in DuckDB's SQL.")],
    runs: Annotated[
        list[str] | None, typer.Option("--run", metavar="RUN", help="Only this run; repeatable; default: all.")
    ] = None,
    most: Annotated[int, typer.Option("--rows", min=1, help="Rows of the table on screen.")] = 200,
    as_csv: Annotated[bool, typer.Option("--csv", help="All rows as CSV.")] = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Ask the logs in SQL. Tables: runs, rounds, tokens, nodes, events, telemetry; nothing is written, no network."""
    import csv
    import sys
    from itertools import islice

    from testbed.cli.output import console, print_json_line, table
    from testbed.errors import ConfigError
    from testbed.runlog.catalog import describe_run, find_run, list_runs
    from testbed.runlog.query import LogDatabase

    if as_csv and as_json:
        raise ConfigError("logs query: --csv or --json, not both")
    chosen = [describe_run(find_run(text, logs)) for text in runs] if runs else list_runs(logs)
    with LogDatabase(chosen) as database:
        answer = database.ask(sql)
        if as_json:
            print_json_line(_document(answer))
        elif as_csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(answer.columns)
            writer.writerows([_cell(value, "") for value in row] for row in answer.rows)
        else:
            rows = [[_cell(value, "-") for value in row] for row in islice(answer.rows, most)]
            console().print(table("", answer.columns, rows))
            if next(answer.rows, None) is not None:
                console(stderr=True).print(f"the first {most} rows; --rows N shows more, --csv all", soft_wrap=True)
    for run in chosen:
        if run.problem:
            console(stderr=True).print(f"left out: {run.problem}", soft_wrap=True)


def _document(answer: Answer) -> dict[str, Any]:
    from testbed.errors import RunLogError

    twice = sorted({name for name in answer.columns if answer.columns.count(name) > 1})
    if twice:
        raise RunLogError(f"query: two columns are called {twice[0]}; give one another name with AS")
    return {
        "columns": answer.columns,
        "rows": [dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows],
    }


def _plain(value: Any) -> Any:
    """A value as JSON knows it: exact numbers stay numbers, stamps become text, an infinity is not known."""
    from decimal import Decimal
    from math import isfinite

    if isinstance(value, Decimal):
        return int(value) if value == int(value) else float(value)
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Iterable) else str(value)


def _cell(value: Any, missing: str) -> str:
    import json

    value = _plain(value)
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:.6g}" if missing else repr(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else str(value)
