"""SQL over the logs of runs: DuckDB, in memory, that can read these logs and nothing else.

Tables: runs, rounds, tokens, nodes, events, telemetry. Columns of rounds, tokens and nodes are the schema's, real
nanoseconds included; an older run's missing ones are null. `run`, `policy_name` and `device_name` say in words what is
numbered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from testbed.errors import RunLogError
from testbed.runlog.catalog import Run, State
from testbed.runlog.columns import Column, columns_of
from testbed.runlog.query_facts import events_table, runs_table, telemetry_table
from testbed.runlog.reader import read_table
from testbed.runlog.schema import NODES, PARQUET, SEGMENT, TABLES

ROWS = (*TABLES, NODES)
OF_DEVICES = ("rounds", NODES)
VIEWS = ("runs", *ROWS, "events", "telemetry")
READ_ONLY = ("SELECT", "EXPLAIN")
AT_ONCE = 10_000
SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
FACTS = {"runs": runs_table, "events": events_table, "telemetry": telemetry_table}


class Answer(NamedTuple):
    columns: list[str]
    rows: Iterator[tuple[Any, ...]]


class LogDatabase:
    """The logs of some runs as tables. Use as a context manager. A damaged manifest leaves its run out."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = [run for run in runs if run.state is not State.UNREADABLE]
        self._files: list[str] = []
        self._made: set[str] = set()
        self._connection = duckdb.connect(":memory:", config=SETTINGS)

    def __enter__(self) -> LogDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def ask(self, sql: str) -> Answer:
        """Answer one SELECT; no file but the runs' own can be read from here on, and none be written.

        Raises RunLogError for what DuckDB cannot answer, and where a log is damaged.
        """
        try:
            statements = self._connection.extract_statements(sql)
            if len(statements) != 1 or statements[0].type.name not in READ_ONLY:
                raise RunLogError("query: one SELECT, DESCRIBE or EXPLAIN at a time; a log is only read")
            mentioned = set(re.findall(r"\w+", sql.lower()))
            self._make_views([view for view in VIEWS if view in mentioned] or VIEWS)
            self._lock()
            self._connection.execute(statements[0])
            return Answer([name for name, *_ in self._connection.description or ()], self._fetch())
        except duckdb.Error as error:
            raise _told(error) from error

    def copy(self, view: str, file: Path, options: str) -> int:
        """Write a whole table to a file; `options` as in DuckDB's COPY. Returns the number of rows."""
        try:
            self._make_views([view])
            self._connection.execute(f"COPY (SELECT * FROM {view}) TO {_text(str(file))} ({options})")  # noqa: S608  (one of VIEWS)
            found = self._connection.fetchone()
        except duckdb.Error as error:
            raise _told(error) from error
        return int(found[0]) if found else 0

    def _fetch(self) -> Iterator[tuple[Any, ...]]:
        try:
            while rows := self._connection.fetchmany(AT_ONCE):
                yield from rows
        except duckdb.Error as error:
            raise _told(error) from error

    def _lock(self) -> None:
        self._connection.execute(f"SET allowed_paths = {_list(self._files)}")
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET lock_configuration = true")

    def _make_views(self, views: Sequence[str]) -> None:
        for view in views:
            if view in FACTS:
                self._connection.register(view, FACTS[view](self._runs))
            else:
                parts = [_no_rows(view), *filter(None, (self._rows_of(run, view) for run in self._runs))]
                unstretched = "REPLACE (coalesce(dilation, 1) AS dilation)" if view == "rounds" else ""  # older runs
                rows = " UNION ALL BY NAME ".join(parts)
                self._connection.execute(f"CREATE VIEW {view} AS SELECT * {unstretched} FROM ({rows})")  # noqa: S608

    def _rows_of(self, run: Run, table: str) -> str | None:
        """SELECT of one run's rows; None where it has none."""
        names = [f"{_text(run.run)} AS run", f"{_named('policy', [p.policy for p in run.policies])} AS policy_name"]
        if table in OF_DEVICES:
            names.append(f"{_named('device', run.devices)} AS device_name")
        if any(run.directory.glob(f"{table}-*{SEGMENT}")):
            source = f"live_{table}_{self._runs.index(run)}"
            self._connection.register(source, _with_plain_lists(read_table(run.directory, table)))
        else:
            pattern = f"{table}{PARQUET}" if table == NODES else f"{table}-*{PARQUET}"
            files = sorted(map(str, run.directory.glob(pattern)), key=lambda name: (len(name), name))
            self._files += files
            source = f"read_parquet({_list(files)}, union_by_name = true)" if files else ""
        return f"(SELECT {', '.join(names)}, * FROM {source})" if source else None  # noqa: S608  (quoted)


def _no_rows(table: str) -> str:
    """The schema's columns, in its order, for runs that lack some."""
    names = ["run", "policy_name", *(["device_name"] if table in OF_DEVICES else [])]
    columns = [f"NULL::VARCHAR AS {name}" for name in names]
    columns += [f'NULL::{_sql_type(column)} AS "{column.name}"' for column in columns_of(table, experts=1)]
    return f"(SELECT {', '.join(columns)} WHERE false)"


def _sql_type(column: Column) -> str:
    dtype = np.dtype(column.format)
    if dtype.kind in "iu":
        name = ("U" if dtype.kind == "u" else "") + {1: "TINYINT", 2: "SMALLINT", 4: "INTEGER", 8: "BIGINT"}[
            dtype.itemsize
        ]
    else:
        name = "BOOLEAN" if dtype.kind == "b" else "DOUBLE" if dtype.itemsize == 8 else "FLOAT"
    return name + ("[]" if column.size else "")


def _with_plain_lists(table: pa.Table) -> pa.Table:
    """As lists are read from Parquet: of any length."""
    for index, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(pa.list_(field.type.value_type)))
    return table


def _named(column: str, names: Sequence[str]) -> str:
    return f"({_list(names)}::VARCHAR[])[{column} + 1]"


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_text, texts))}]"


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _told(error: duckdb.Error) -> RunLogError:
    what = str(error).split("\n\nLINE")[0]
    return RunLogError(
        f"query: {what}; `testbed logs query 'DESCRIBE rounds'` lists columns, tables: {', '.join(VIEWS)}"
    )
