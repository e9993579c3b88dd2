"""A run's tables for its report: asked in SQL, so that every number of a figure can be asked for again."""
# ruff: noqa: S608  (numbers and a quoted name of the log itself; nothing but its own tables can be read)

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed.errors import RunLogError
from testbed.runlog.catalog import describe_run
from testbed.runlog.query import LogDatabase
from testbed.runlog.reader import read_manifest

Row = dict[str, Any]


class RunData:
    """One run, open for questions. Raises RunLogError where its log is damaged."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.run = describe_run(self.run_dir)
        if self.run.problem:
            raise RunLogError(self.run.problem)
        self.manifest = read_manifest(self.run_dir)
        self.devices = list(self.run.devices)
        self.policies = [policy.policy for policy in self.run.policies]

    @property
    def here(self) -> str:
        """The condition on the column `run` that makes a question one about this run."""
        return "run = '" + self.run.run.replace("'", "''") + "'"

    def rows(self, sql: str) -> list[Row]:
        """What the query answers, as `testbed logs query` does; what is unknown is None, never NaN."""
        with LogDatabase([self.run]) as database:
            answer = database.ask(sql)
            return [dict(zip(answer.columns, map(_known, row), strict=True)) for row in answer.rows]

    def policy(self, index: int) -> str:
        return self.policies[index] if index < len(self.policies) else f"policy {index}"

    def device(self, index: int) -> str:
        return self.devices[index] if index < len(self.devices) else f"device {index}"

    @cached_property
    def compared(self) -> list[int]:
        """The run's first policy, and the one whose prefill rounds are the fastest."""
        mean_ms = self.rows(
            f"select policy, avg(round_ns / dilation) / 1e6 as ms from rounds\n"
            f"where {self.here} and device = 0 and phase = 0 group by policy order by policy"
        )
        if not mean_ms:
            return [0]
        fastest = min(mean_ms, key=lambda row: float(row["ms"]))
        return list(dict.fromkeys([mean_ms[0]["policy"], fastest["policy"]]))

    @cached_property
    def first_sent_ns(self) -> int:
        """When the run's first request went out, on the BS's monotonic clock."""
        [row] = self.rows(f"select min(bs_sent_ns) as ns from rounds where {self.here}")
        return int(row["ns"] or 0)


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
