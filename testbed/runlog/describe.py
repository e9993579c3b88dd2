"""What a run's folder holds and what every column means, as logs/README.md.

python -m testbed.runlog.describe > logs/README.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from testbed.runlog.columns import columns_of
from testbed.runlog.schema import KINDS, NODES, PHASES, REPLY_MEANING, STATUS_MEANING

README_HEAD = """# What a run leaves here
<!-- written by `python -m testbed.runlog.describe > logs/README.md`: change what writes it instead -->

`logs/<run-id>/`, the run id being `YYYYmmdd-HHMMSS-name` in UTC, holds

| file | what |
|---|---|
| `manifest.json` | config, versions, seeds, hashes of model and text, machine, policies, devices, what is emulated |
| `config.toml` | the run file as it was given |
| `events.jsonl` | rare events, one JSON object a line: a node joined, was lost; `board`: what one is, by preflight |
| `rounds-0000.parquet`, … | one row per (round, device), also for a device that got no rows |
| `tokens-0000.parquet`, … | one row per (round, token) |
| `rounds-0000.seg`, … | the same rows while the run goes on, or after it was killed |
| `rounds-0000.damaged`, … | such a file after a power cut, kept for what is left of rows that are not whole |
| `results.json` | the table of the run, as it was printed |
| `summary.json`, `summary.npz` | times per node and phase in bins of 1 %, which `testbed logs show` reads |
| `nodes/NAME.log` | what the node NAME of this machine printed |
| `nodes/NAME/*.seg` | its own rows until they are collected |
| `nodes.parquet` | the nodes' own rows, one per block, also of replies that got lost: `testbed logs collect` |
| `links.parquet` | what the emulated links really did, where they were a relay |

DuckDB, Polars and pandas read the Parquet files, `testbed logs query` asks all runs at once, and
`testbed.runlog.reader` reads them and the segments alike.
A row that was recorded survives `kill -9`, and after a second a power cut. Rows that one took are counted, as are those
that a full disk did not take: in Parquet's metadata, by `testbed logs recover`, `ls` and `show`, and in an event
`rows_missing` or `rows_lost`; of `rounds` only whole rounds are kept.
Unknown is null, never 0. Durations are differences on one clock; stamps of two machines must not be subtracted without
the offset between their clocks."""


NODES_NOTE = f"""
A row of `{NODES}` and one of `rounds` with the same round, device and attempt are of the same block. Rounds from 2^61
up are probes, of which the BS logs no row. A node writes its rows to a file of its own (`testbed node --rows`), where
they survive `kill -9`. They reach the disk when the node had no block for a second; while it works the kernel brings
them there when it likes, within half a minute as a rule, so that no round waits for a node's disk."""


TELEMETRY_NOTE = """
## Table `telemetry`: one row per sample and figure

What boards and nodes said of themselves in heartbeats, at most once a second each; it lives in `events.jsonl`, and
`testbed logs query` has it as a table.

| column | type | meaning |
|---|---|---|
| `device_name` | text | the node |
| `sampled_ns` | int64 | when it was sampled, on the base station's monotonic clock; late by the heartbeat's way |
| `figure` | text | what, its unit at its end: `power_w`, `cpu_c`, `gpu_mhz`, `machine_cpu_percent`, `rss_bytes` |
| `unit` | text | °C, W, MHz, %, bytes, rpm; empty for a plain number |
| `value` | float64 or null | null: the sensor was off, or did not answer |
| `rail` | text or null | the rail that `power_w` was measured on; `sum` where rails were added up |"""


def _readme_lines() -> Iterator[str]:
    yield README_HEAD
    yield "\n## Where a value comes from\n\n| kind | meaning |\n|---|---|"
    yield from (f"| {kind} | {meaning} |" for kind, meaning in KINDS.items())
    yield "\n## The phases of a round\n\n| where | phase | column | note |\n|---|---|---|---|"
    for phase in PHASES:
        yield f"| {phase.where} | {phase.name} | {f'`{phase.column}`' if phase.column else ''} | {phase.note} |"
    tables = {"rounds": "(round, device)", "tokens": "(round, token)", NODES: "block that a node got, as it saw it"}
    for table, row in tables.items():
        yield f"\n## Table `{table}`: one row per {row}\n"
        yield "| column | type | unit | kind | meaning |\n|---|---|---|---|---|"
        for column in columns_of(table, experts=1):
            size = f"[{column.size}]" if column.size else ""
            null = " or null" if column.nullable else ""
            values = f"{np.dtype(column.format).name}{size}{null}"
            yield f"| `{column.name}` | {values} | {column.unit} | {column.kind} | {column.meaning} |"
    yield "\nK experts per token, E experts of the layer. Half-precision scores read back as float32, equal in value."
    yield NODES_NOTE
    yield TELEMETRY_NOTE
    meanings: dict[str, Mapping[Any, str]] = {"Status": STATUS_MEANING, "Reply": REPLY_MEANING}
    for title, meaning_of in meanings.items():
        yield f"\n## {title}\n\n| value | name | meaning |\n|---|---|---|"
        yield from (f"| {value.value} | {value.name.lower()} | {meaning} |" for value, meaning in meaning_of.items())


def readme() -> str:
    return "\n".join(_readme_lines()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(readme())
