"""Follows the rounds of a run that is still recorded, or reads those of one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import sleep
from typing import Any

import pyarrow as pa

from testbed.errors import RunLogError
from testbed.runlog.catalog import is_recorded
from testbed.runlog.reader import read_manifest, read_parquet, to_table
from testbed.runlog.schema import PARQUET, SEGMENT, GenerationPhase, Status
from testbed.runlog.segment import read_segment

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Round:
    """One expert round. Times are emulated ones where the run is: without dilation."""

    round: int
    policy: str
    prompt: int
    layer: int
    phase: str
    tokens: int
    rows: int  # pairs (token, expert) sent to devices
    round_s: float | None
    slowest: str | None  # the device whose reply was complete last; None where there was none
    slowest_s: float | None  # ... from its request's first byte until then, as the BS's clock has it
    unanswered: dict[str, str]  # device -> late, lost, rejected or invalid

    def document(self) -> dict[str, Any]:
        return asdict(self)


def follow(run_dir: Path, last: int, *, once: bool, wait: Callable[[float], None] = sleep) -> Iterator[Round]:
    """The `last` rounds that are there, then each new one until the run is no longer recorded; `once`: only the former.

    Raises RunLogError where the log is damaged.
    """
    manifest = read_manifest(run_dir)
    reader = _Reader(run_dir, len(manifest["devices"]))
    yield from _rounds(reader.last_rows(last), manifest)
    while not once:
        lives = is_recorded(run_dir)  # asked before reading: what was written until its end is read once more
        yield from _rounds(reader.new_rows(), manifest)
        if not lives:
            return
        wait(POLL_S)


class _Reader:
    """Where reading has come to. Parts are read in their order; sealing one changes nothing in its rows."""

    def __init__(self, run_dir: Path, devices: int) -> None:
        self._run_dir, self._devices, self._part, self._read = run_dir, devices, 0, 0
        while self._file(self._part + 1) is not None:
            self._part += 1

    def last_rows(self, rounds: int) -> list[pa.Table]:
        """The rows of the last rounds that are there: as many parts as it takes, from the newest backwards."""
        before, rows = self._part, self.new_rows()
        while before > 0 and sum(map(len, rows)) < rounds * self._devices:
            before -= 1
            rows.insert(0, self._whole_rounds(before, 0))
        together = pa.concat_tables(rows)
        return [together.slice(max(0, len(together) - rounds * self._devices))]

    def new_rows(self) -> list[pa.Table]:
        """Rows of whole rounds that were written since the last call."""
        rows = []
        while True:
            following = self._file(self._part + 1)  # looked for first: once it is there, nothing is added to this part
            rows.append(self._whole_rounds(self._part, self._read))
            self._read += len(rows[-1])
            if following is None:
                return rows
            self._part, self._read = self._part + 1, 0

    def _whole_rounds(self, part: int, start: int) -> pa.Table:
        """From row `start` on. A round has a row for each device; of the last one some may still be to come."""
        rows = self._rows(part, start)
        return rows.slice(0, len(rows) // self._devices * self._devices)

    def _rows(self, part: int, start: int) -> pa.Table:
        path = self._file(part)
        if path is None:
            raise RunLogError(f"{self._run_dir}: rounds-{part:04d}: this part of the log is missing")
        if path.suffix == SEGMENT:
            try:
                header, records, *_ = read_segment(path)
                return to_table(header, records[start:])
            except FileNotFoundError:  # sealed in this moment
                path = path.with_suffix(PARQUET)
        return read_parquet(path).slice(start)

    def _file(self, part: int) -> Path | None:
        stem = self._run_dir / f"rounds-{part:04d}"
        return next((path for path in map(stem.with_suffix, (SEGMENT, PARQUET)) if path.exists()), None)


def _rounds(chunks: list[pa.Table], manifest: dict[str, Any]) -> Iterator[Round]:
    devices = len(manifest["devices"])
    for rows in chunks:
        for start in range(0, len(rows), devices):
            yield summed_up(rows.slice(start, devices), manifest)


def summed_up(rows: pa.Table, manifest: dict[str, Any]) -> Round:
    """One round out of its rows, one for each device."""
    of_round = rows.slice(0, 1).to_pylist()[0]
    dilation, names = of_round.get("dilation", 1.0), manifest["devices"]
    rtt_ns = {names[row["device"]]: row["rtt_ns"] for row in rows.select(["device", "rtt_ns"]).to_pylist()}
    answered = {name: ns for name, ns in rtt_ns.items() if ns is not None}
    slowest = max(answered, key=answered.__getitem__, default=None)
    status = [Status(value) for value in rows["status"].to_pylist()]
    return Round(
        round=of_round["round"],
        policy=manifest["policies"][of_round["policy"]],
        prompt=of_round["prompt"],
        layer=of_round["layer"],
        phase=GenerationPhase(of_round["phase"]).name.lower(),
        tokens=of_round["tokens"],
        rows=sum(rows["rows"].to_pylist()),
        round_s=None if of_round["round_ns"] is None else of_round["round_ns"] / 1e9 / dilation,
        slowest=slowest,
        slowest_s=None if slowest is None else answered[slowest] / 1e9 / dilation,
        unanswered={
            name: value.name.lower() for name, value in zip(rtt_ns, status, strict=True) if value > Status.ANSWERED
        },
    )
