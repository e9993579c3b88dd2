from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from testbed.runlog import columns, schema
from testbed.runlog.describe import readme

LOGS_README = Path(__file__).parents[2] / "logs" / "README.md"
ALL_COLUMNS = (*columns.ROUND_COLUMNS, *columns.token_columns(), *columns.NODE_RECORD, *columns.NODE_COLUMNS)


def test_the_readme_of_the_logs_is_what_the_schema_says() -> None:
    assert LOGS_README.read_text(encoding="utf-8") == readme()


def test_describe_run_as_a_program_prints_the_readme_and_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "testbed.runlog.describe"], capture_output=True, check=True, timeout=60
    )
    assert done.stdout.decode() == readme()
    assert done.stderr == b""


def test_every_column_names_its_kind_and_the_unit_that_its_name_ends_in() -> None:
    for column in ALL_COLUMNS:
        assert column.kind in schema.KINDS
        assert column.meaning
        name = column.name.removesuffix("_previous")
        if name.endswith("_bits_per_s"):
            assert column.unit == "bit/s"
            continue
        for unit in ("ns", "s"):
            assert name.endswith(f"_{unit}") == (column.unit == unit), column.name


def test_every_phase_that_has_a_column_has_one_of_the_rounds_table() -> None:
    names = {column.name for column in columns.ROUND_COLUMNS}
    assert {phase.column for phase in schema.PHASES if phase.column} <= names
    assert [phase.name for phase in schema.PHASES if phase.where == "node"] == [
        "queue",
        "dequantise",
        "staging",
        "compute",
        "quantise",
    ]


def test_a_record_ends_with_an_aligned_commit_mark() -> None:
    for table, experts in (("rounds", 8), ("tokens", 8), ("tokens", 0)):
        dtype = columns.record_dtype(columns.columns_of(table, experts), top_k=3, experts=8)
        assert dtype.names is not None
        assert dtype.names[-1] == columns.COMMIT
        assert dtype.fields is not None
        assert dtype.fields[columns.COMMIT][1] == dtype.itemsize - 8
        assert dtype.itemsize % 8 == 0


def test_a_gate_without_scores_leaves_no_score_column() -> None:
    assert "score" not in {column.name for column in columns.columns_of("tokens", experts=0)}


def test_unknown_is_written_as_a_value_that_no_measurement_has() -> None:
    assert columns.missing_value(np.dtype("<i8")) == -1
    assert columns.missing_value(np.dtype("<u8")) == 2**64 - 1
    assert np.isnan(columns.missing_value(np.dtype("<f8")))
