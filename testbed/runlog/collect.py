"""Brings the rows that nodes wrote themselves into a run's folder: one table, `nodes.parquet`.

Rows that are there already stay, so files may be collected in any order, overlapping, and more than once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from testbed.errors import RunLogError
from testbed.runlog.columns import NODE_COLUMNS
from testbed.runlog.node_rows import NodeRows, is_written, read_node_rows
from testbed.runlog.reader import read_manifest, read_parquet, to_table
from testbed.runlog.schema import NODES, PARQUET, SCHEMA_VERSION, SEGMENT
from testbed.runlog.segment import new_file
from testbed.runlog.summary_rows import batches, log_parts

FIRST_PROBE = 2**61  # rounds from here on are probes; a probe's number may come again
BLOCK = ["round", "device", "attempt"]
OF_ROUND = ["policy", "prompt", "phase"]
NAMES = [column.name for column in NODE_COLUMNS]
OWN = [name for name in NAMES if name not in OF_ROUND]
TYPES = pa.schema([(column.name, pa.from_numpy_dtype(np.dtype(column.format))) for column in NODE_COLUMNS])


class Collected(NamedTuple):
    """What came of it."""

    file: Path
    rows: int  # in the table now
    new_rows: int
    contradicting: int  # blocks of which two files say different things: both are kept
    not_kept: dict[str, int]  # by device: rows for which its disk had no room, in the files read now
    problems: list[RunLogError]  # of files that were left out


def collect(run_dir: Path, folders: Sequence[Path] = ()) -> Collected:
    """Add the rows of this run that lie in its own `nodes` folder and in `folders`, at any depth.

    Files in the run's own folder that no node writes to are removed once their rows are in the table. Raises
    RunLogError where there is nothing to collect, or the run cannot be told from others.
    """
    manifest = read_manifest(run_dir)
    number, devices = _run_number(run_dir, manifest), manifest["devices"]
    target = run_dir / f"{NODES}{PARQUET}"
    own_files = sorted((run_dir / NODES).rglob(f"*{SEGMENT}"))
    ended = {path for path in own_files if _has_ended(path)}  # asked before they are read: to their end
    paths = {path.resolve(): path for path in (*own_files, *_files_in(folders))}
    if not paths and not target.exists():
        raise RunLogError(f"{run_dir}: no rows of nodes; name the folders that they were copied to")
    read, problems = _read_all(list(paths.values()), number, devices)
    before = [read_parquet(target).select(OWN)] if target.exists() else []
    found = [_table_of(file, number, devices) for file in read if file.header.device in devices]
    table = _joined(run_dir, _merged([_nothing(), *before, *found]))
    _write(target, table)
    for file in read:
        if file.path in ended and file.header.device in devices and not file.missing:
            file.path.unlink(missing_ok=True)
            with suppress(OSError):  # others are still in it
                file.path.parent.rmdir()
    new_rows = table.num_rows - sum(rows.num_rows for rows in before)
    return Collected(target, table.num_rows, new_rows, _contradicting(table), _not_kept(read), problems)


def collect_what_is_there(run_dir: Path) -> None:
    """At the end of a run: its own nodes' rows, if there are any. What goes wrong is said and spoils nothing."""
    if not any((run_dir / NODES).rglob(f"*{SEGMENT}")):
        return
    try:
        problems = collect(run_dir).problems
    except (RunLogError, OSError, pa.ArrowException) as error:
        problems = [RunLogError(str(error))]
    for problem in problems:
        print(f"nodes' own rows not collected: {problem}; `testbed logs collect` tries again", file=sys.stderr)


def _run_number(run_dir: Path, manifest: Mapping[str, Any]) -> int:
    number = manifest.get("run_number")
    if not isinstance(number, str) or not number.isdecimal() or not isinstance(manifest.get("devices"), list):
        raise RunLogError(f"{run_dir}: its manifest has no run_number: it was recorded before nodes kept rows")
    return int(number)


def _files_in(folders: Sequence[Path]) -> list[Path]:
    files = []
    for folder in folders:
        here = [folder] if folder.is_file() else sorted(folder.rglob(f"*{SEGMENT}"))
        if not here:
            raise RunLogError(f"{folder}: no rows of nodes in this folder; copy a node's --rows folder and name it")
        files += here
    return files


def _has_ended(path: Path) -> bool:
    try:
        return not is_written(path)
    except OSError:  # who reads it will say why
        return False


def _read_all(paths: Sequence[Path], number: int, devices: Sequence[str]) -> tuple[list[NodeRows], list[RunLogError]]:
    read, problems = [], []
    for path in paths:
        try:
            file = read_node_rows(path)
        except RunLogError as error:
            problems.append(error)
            continue
        read.append(file)
        if file.header.device not in devices and (file.records["run_number"] == number).any():
            problems.append(RunLogError(f"{path}: of {file.header.device}, which is no device of this run; left out"))
        if file.missing:
            lost = f"of {file.missing} rows after row {len(file.records) - 1} not all reached the disk"
            problems.append(RunLogError(f"{path}: {lost}; those before are taken"))
    return read, problems


def _table_of(file: NodeRows, number: int, devices: Sequence[str]) -> pa.Table:
    """The rows of one run, as in the table `nodes` but for what the base station's log adds."""
    rows = to_table({}, file.records[file.records["run_number"] == number])
    same = {"device": devices.index(file.header.device), "node_boot": file.header.boot_id}
    for name, value in same.items():
        rows = rows.append_column(name, pa.array(np.full(rows.num_rows, value), TYPES.field(name).type))
    return rows.select(OWN)


def _nothing() -> pa.Table:
    return TYPES.empty_table().select(OWN)


def _merged(tables: Sequence[pa.Table]) -> pa.Table:
    """Every row once. One that was read while its reply was under way is overtaken by what it became."""
    rest = [name for name in OWN if name != "reply"]
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    return rows.group_by(rest).aggregate([("reply", "max")]).rename_columns([*rest, "reply"])


def _joined(run_dir: Path, rows: pa.Table) -> pa.Table:
    """With policy, prompt and phase from the run's own rows, where it knows the round; in order."""
    known = [
        table.filter(pc.equal(table["device"], 0)).select(["round", *OF_ROUND])  # of a round, all devices say the same
        for table in batches(log_parts(run_dir, "rounds"), ("round", "device", *OF_ROUND))
    ]
    of_round = pa.concat_tables([TYPES.empty_table().select(["round", *OF_ROUND]), *known])
    rows = rows.join(of_round.group_by(["round"]).aggregate([(name, "max") for name in OF_ROUND]), "round")
    rows = rows.rename_columns([name.removesuffix("_max") for name in rows.column_names])
    order = [(name, "ascending") for name in (*BLOCK, "node_boot", "node_received_ns")]
    about = {"wdmoe": f'{{"schema": {SCHEMA_VERSION}, "table": "{NODES}"}}'}
    return rows.select(NAMES).sort_by(order).cast(TYPES).replace_schema_metadata(about)


def _write(target: Path, table: pa.Table) -> None:
    with new_file(target) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    if not read_parquet(target).equals(table):
        raise RunLogError(f"{target}: reads back otherwise than it was written; the nodes' files are kept, try again")


def _contradicting(table: pa.Table) -> int:
    blocks = table.filter(pc.less(table["round"], FIRST_PROBE)).group_by(BLOCK).aggregate([([], "count_all")])
    return int(pc.sum(pc.greater(blocks["count_all"], 1)).as_py() or 0)


def _not_kept(files: Sequence[NodeRows]) -> dict[str, int]:
    lost: dict[str, int] = {}
    for file in files:
        if file.not_kept:
            lost[file.header.device] = lost.get(file.header.device, 0) + file.not_kept
    return lost
