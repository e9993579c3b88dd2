"""Replay of a measured channel: a CSV of rates or signal-to-noise ratios over time.

    time_s,device,down_bits_per_s,up_bits_per_s        or        time_s,device,snr_down_db,snr_up_db
    0.0,jetson-0,50e6,20e6                                       0.0,jetson-0,18.5,11

Columns may stand in any order; times never decrease. A row holds until its device's next one, at most
`trace_max_gap_s`. The last row holds for ever: a trace cannot say how to go on, and starting over would join two
moments that never met. `end_s` tells how far the trace reaches, for whoever must say that it was outrun.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from testbed.channel.radio import MOST_BITS_PER_S, Links, link_bandwidth_hz
from testbed.config.radio import RadioSection
from testbed.errors import ConfigError

RATE_COLUMNS = ("time_s", "device", "down_bits_per_s", "up_bits_per_s")
SNR_COLUMNS = ("time_s", "device", "snr_down_db", "snr_up_db")


class _Row(NamedTuple):
    line: int
    time_s: float
    device: str
    down_bits_per_s: float
    up_bits_per_s: float


class TraceChannel:
    """Rates of N devices over time, from a file. Raises ConfigError with file and line for whatever is wrong in it."""

    def __init__(self, path: Path, device_names: Sequence[str], section: RadioSection) -> None:
        band_hz = link_bandwidth_hz(section, len(device_names))
        rows_by_device = _by_device(path, _read(path, band_hz), device_names)
        self.end_s = max(rows[-1].time_s for rows in rows_by_device.values())
        for rows in rows_by_device.values():
            _check_cover(path, rows, self.end_s, section.trace_max_gap_s)
        self._time_s = [np.array([row.time_s for row in rows]) for rows in rows_by_device.values()]
        self._down = [np.array([row.down_bits_per_s for row in rows]) for rows in rows_by_device.values()]
        self._up = [np.array([row.up_bits_per_s for row in rows]) for rows in rows_by_device.values()]

    def links(self, prompt: int, time_s: float) -> Links:  # noqa: ARG002 (a Channel is asked with both)
        """The rates at `time_s` since the start. Raises ValueError for a time before it."""
        if not time_s >= 0:
            raise ValueError(f"a trace starts at 0 s; there is no {time_s} s")
        row_N = [int(np.searchsorted(times, time_s, side="right")) - 1 for times in self._time_s]
        return Links(
            np.array([down[row] for down, row in zip(self._down, row_N, strict=True)]),
            np.array([up[row] for up, row in zip(self._up, row_N, strict=True)]),
        )


def _read(path: Path, band_hz: float) -> Iterator[_Row]:
    """The file's rows with rates, as they are checked one by one."""
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_header(path, header)
            yield from (_row(path, reader.line_num, header, fields, band_hz) for fields in reader if fields)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name an existing trace (CSV) in radio.trace") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a trace (CSV) in radio.trace") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save the trace as UTF-8") from error
    except csv.Error as error:
        line = reader.line_num if reader else 1
        raise ConfigError(f"{path}, line {line}: not valid CSV ({error}); mend that line") from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    if sorted(header) not in (sorted(RATE_COLUMNS), sorted(SNR_COLUMNS)):
        raise ConfigError(
            f"{path}, line 1: the columns are {', '.join(header) or 'missing'}; they must be "
            f"{', '.join(RATE_COLUMNS)} or {', '.join(SNR_COLUMNS)}"
        )


def _row(path: Path, line: int, header: Sequence[str], fields: Sequence[str], band_hz: float) -> _Row:
    if len(fields) != len(header):
        raise ConfigError(f"{path}, line {line}: has {len(fields)} fields instead of {len(header)}; mend that line")
    named = dict(zip(header, fields, strict=True))
    columns = RATE_COLUMNS if RATE_COLUMNS[2] in named else SNR_COLUMNS
    time_s = _number(path, line, named, "time_s")
    if not 0 <= time_s < math.inf:
        raise ConfigError(f"{path}, line {line}: time_s must be a time from 0 on, not {time_s:g}")
    down, up = (_rate(path, line, named, column, band_hz) for column in columns[2:])
    return _Row(line, time_s, named["device"], down, up)


def _rate(path: Path, line: int, named: Mapping[str, str], column: str, band_hz: float) -> float:
    """bit/s as the column says, or B log2(1 + SNR) of it (Eq. 2), written so that no SNR overflows."""
    rate = _number(path, line, named, column)
    if column in SNR_COLUMNS:
        rate = band_hz * float(np.logaddexp2(0.0, rate / 10 * math.log2(10)))
    if not 0 < rate <= MOST_BITS_PER_S:
        raise ConfigError(
            f"{path}, line {line}: {column} {named[column]} is a rate of {rate:g} bit/s; "
            f"it must be above 0 and at most {MOST_BITS_PER_S:g}"
        )
    return rate


def _number(path: Path, line: int, named: Mapping[str, str], column: str) -> float:
    try:
        return float(named[column])
    except ValueError:
        raise ConfigError(f'{path}, line {line}: {column} must be a number, not "{named[column][:60]}"') from None


def _by_device(path: Path, rows: Iterator[_Row], device_names: Sequence[str]) -> dict[str, list[_Row]]:
    """Every device's rows, in the order of `device_names`."""
    grouped: dict[str, list[_Row]] = {name: [] for name in device_names}
    latest_s = 0.0
    for row in rows:
        if row.device not in grouped:
            raise ConfigError(
                f'{path}, line {row.line}: there is no [[device]] "{row.device[:60]}"; '
                f"the run file's are {', '.join(device_names)}"
            )
        if row.time_s < latest_s:
            raise ConfigError(
                f"{path}, line {row.line}: time_s goes back from {latest_s:g} to {row.time_s:g}; sort the rows by time"
            )
        latest_s = row.time_s
        grouped[row.device].append(row)
    for name, own in grouped.items():
        if not own:
            raise ConfigError(f'{path}: has no row for device "{name}"; add some, from time 0 on')
    return grouped


def _check_cover(path: Path, rows: Sequence[_Row], end_s: float, most_s: float) -> None:
    """A device is covered from 0 to the trace's end, no row standing for longer than `most_s`."""
    where = f'device "{rows[0].device}"'
    if rows[0].time_s > 0:
        raise ConfigError(
            f"{path}, line {rows[0].line}: {where} starts at {rows[0].time_s:g} s; it must be covered from 0 s on"
        )
    ends = [(row.line, row.time_s) for row in rows[1:]] + [(rows[-1].line, end_s)]
    for i, (row, (line, until_s)) in enumerate(zip(rows, ends, strict=True)):
        if until_s - row.time_s > most_s:
            raise ConfigError(
                f"{path}, line {line}: {where} has no row between {row.time_s:g} and {until_s:g} s; "
                f"fill the gap, or raise radio.trace_max_gap_s ({most_s:g})"
            )
        if i and row.time_s == rows[i - 1].time_s:
            raise ConfigError(f"{path}, line {row.line}: {where} has two rows at {row.time_s:g} s; remove one")
