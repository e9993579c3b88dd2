"""How long `testbed logs show` takes over many rows: from the summary, and with `--exact` from the rows.

A sealed run of eight nodes and three policies is made up in a temporary folder. Each command is a process of its own,
as a person starts it; the best of three counts. The aim for ten million rows: 0.5 s and 8 s. The last line is one
JSON document.

    python benchmarks/logs_show.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from testbed.runlog.catalog import write_results
from testbed.runlog.columns import ROUND_COLUMNS, record_dtype
from testbed.runlog.manifest import write_manifest
from testbed.runlog.reader import to_table
from testbed.runlog.summary import summary_of

DEVICES, POLICIES, SEGMENT_ROWS, REPEATS = 8, 3, 65_536, 3
TESTBED = Path(sys.executable).with_name("testbed")
NAMES = [f"node-{i}" for i in range(DEVICES)]


def made_up_rows(first_row: int, count: int, total: int) -> np.ndarray[Any, Any]:
    """Rows as a recorder writes them: log-normal durations, so that no two are alike."""
    rng = np.random.default_rng(first_row)
    rows = np.zeros(count, record_dtype(ROUND_COLUMNS, 1, 0))
    place = np.arange(first_row, first_row + count)
    for column in ROUND_COLUMNS:
        if column.unit == "ns":
            rows[column.name] = rng.lognormal(13, 1, count)
        elif column.nullable:
            rows[column.name] = column.missing
    rows["round"], rows["device"] = place // DEVICES, place % DEVICES
    rows["policy"], rows["phase"] = place * POLICIES // total, place // DEVICES % 2
    rows["prompt"], rows["rows"], rows["status"], rows["dilation"] = place // 10_000, 1, 1, 10
    rows["bs_sent_ns"] = place // DEVICES * 10_000_000
    rows["bs_received_ns"] = rows["bs_sent_ns"] + rows["rtt_ns"]
    return rows


def make_run(run_dir: Path, total: int) -> None:
    policies = [f"policy-{i}" for i in range(POLICIES)]
    facts = {"config": {}, "policies": policies, "devices": NAMES, "emulated": dict.fromkeys(NAMES), "links": "made up"}
    write_manifest(run_dir, facts)
    (run_dir / "events.jsonl").touch()
    write_results(run_dir, {"rows": []})
    for number, first_row in enumerate(range(0, total, SEGMENT_ROWS)):
        rows = made_up_rows(first_row, min(SEGMENT_ROWS, total - first_row), total)
        path = run_dir / f"rounds-{number:04d}.parquet"
        pq.write_table(to_table({}, rows), path, compression="zstd", write_page_checksum=True)


def seconds(*arguments: str) -> dict[str, float]:
    """Of one process, wall time and CPU time, each the best of some: on a busy machine they differ."""
    wall_s, cpu_s = [], []
    for _ in range(REPEATS):
        before, start_s = getrusage(RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([TESTBED, *arguments], check=True, stdout=subprocess.DEVNULL)
        wall_s.append(time.perf_counter() - start_s)
        after = getrusage(RUSAGE_CHILDREN)
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_s": min(wall_s), "cpu_s": min(cpu_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table rounds (default %(default)s)")
    rows = parser.parse_args().rows // DEVICES * DEVICES
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        make_run(run_dir, rows)
        start_s = time.perf_counter()
        summary_of(run_dir)
        figures: dict[str, Any] = {
            "rows": rows,
            "write_summary_s": time.perf_counter() - start_s,
            "commands": {
                "logs show --help": seconds("logs", "show", "--help"),
                "logs show": seconds("logs", "show", str(run_dir)),
                "logs show --exact": seconds("logs", "show", str(run_dir), "--exact"),
            },
            "summary_bytes": sum(path.stat().st_size for path in run_dir.glob("summary.*")),
        }
    print(
        f"{rows} rows: summary written in {figures['write_summary_s']:.2f} s, {figures['summary_bytes'] / 1e3:.0f} kB"
    )
    for command, taken in figures["commands"].items():
        print(f"{command}: {taken['wall_s']:.2f} s, CPU {taken['cpu_s']:.2f} s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
