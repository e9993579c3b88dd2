"""Replay of a measured channel, and what is said of a file that cannot be one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.channel.trace import TraceChannel
from testbed.config.radio import RadioSection
from testbed.errors import ConfigError

NAMES = ["jetson-0", "jetson-1"]
RATES = "time_s,device,down_bits_per_s,up_bits_per_s\n"
SNRS = "time_s,device,snr_down_db,snr_up_db\n"
START = RATES + "0,jetson-0,5e7,2e7\n0,jetson-1,4e7,1e7\n"
Times = list[tuple[float, float, float]]


def trace(folder: Path, text: str, **keys: float | str) -> TraceChannel:
    file = folder / "trace.csv"
    file.write_text(text, encoding="utf-8")
    return TraceChannel(file, NAMES, RadioSection(**keys))  # type: ignore[arg-type]


def refusal(folder: Path, text: str, **keys: float | str) -> str:
    """The one line that a trace is refused with, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        trace(folder, text, **keys)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(f"{folder / 'trace.csv'}")
    return line.removeprefix(f"{folder / 'trace.csv'}").removeprefix(", ").removeprefix(": ")


def test_a_row_holds_until_the_devices_next_one_and_the_last_for_ever(tmp_path: Path) -> None:
    channel = trace(tmp_path, START + "1.5,jetson-1,8e6,7e6\n2,jetson-0,6e6,5e6\n")
    for time_s, down in [
        (0.0, [5e7, 4e7]),
        (1.499, [5e7, 4e7]),
        (1.5, [5e7, 8e6]),
        (2.0, [6e6, 8e6]),
        (1e6, [6e6, 8e6]),
    ]:
        assert channel.links(0, time_s).down_bits_per_s_N.tolist() == down
    assert channel.links(3, 2.0).up_bits_per_s_N.tolist() == [5e6, 7e6]
    assert channel.end_s == 2.0


def test_a_signal_to_noise_ratio_becomes_shannons_rate_on_the_links_band(tmp_path: Path) -> None:
    text = SNRS + "0,jetson-0,0,10\n0,jetson-1,-10,20\n"
    expected = 50e6 * np.log2([[2, 1.1], [11, 101]])
    assert np.array(trace(tmp_path, text).links(0, 0.0)) == pytest.approx(expected)
    assert np.array(trace(tmp_path, text, medium="shared").links(0, 0.0)) == pytest.approx(2 * expected)


def test_columns_may_be_reordered_and_a_spreadsheets_mark_and_empty_lines_are_no_matter(tmp_path: Path) -> None:
    text = "\ufeffdevice,up_bits_per_s,time_s,down_bits_per_s\njetson-1,1,0,2\n\njetson-0,3,0,4\n"
    links = trace(tmp_path, text).links(0, 0.0)
    assert (links.down_bits_per_s_N.tolist(), links.up_bits_per_s_N.tolist()) == ([4, 2], [3, 1])


@given(
    st.lists(st.tuples(st.floats(0.001, 9), st.floats(1, 1e12), st.floats(1, 1e12)), max_size=8),
    st.floats(0, 80),
)
def test_what_is_written_is_replayed(tmp_path_factory: pytest.TempPathFactory, steps: Times, asked_s: float) -> None:
    rows, now_s = [(0.0, 3.0, 4.0)], 0.0
    for step_s, down, up in steps:
        now_s += step_s
        rows.append((now_s, down, up))
    lines = [f"{time_s!r},{name},{down!r},{up!r}\n" for time_s, down, up in rows for name in NAMES]
    links = trace(tmp_path_factory.mktemp("trace"), RATES + "".join(lines)).links(0, asked_s)
    _, down, up = [row for row in rows if row[0] <= asked_s][-1]
    assert (links.down_bits_per_s_N.tolist(), links.up_bits_per_s_N.tolist()) == ([down] * 2, [up] * 2)


@pytest.mark.parametrize("time_s", [-0.1, math.nan])
def test_there_is_no_time_before_the_start(tmp_path: Path, time_s: float) -> None:
    with pytest.raises(ValueError, match="starts at 0 s"):
        trace(tmp_path, START).links(0, time_s)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "line 1: the columns are missing; they must be"),
        ("time,device,down,up\n", "line 1: the columns are time, device, down, up; they must be"),
        (RATES.replace("up_bits_per_s", "snr_up_db"), "line 1: the columns are"),
        (RATES.replace("\n", ",device\n"), "line 1: the columns are"),
        (START + "1,jetson-0,1\n", "line 4: has 3 fields instead of 4"),
        (START + "soon,jetson-0,1,1\n", 'line 4: time_s must be a number, not "soon"'),
        (START + "1,jetson-0,,1\n", 'line 4: down_bits_per_s must be a number, not ""'),
        (RATES + "-1,jetson-0,1,1\n", "line 2: time_s must be a time from 0 on, not -1"),
        (START + "nan,jetson-0,1,1\n", "line 4: time_s must be a time from 0 on"),
        (START + "inf,jetson-0,1,1\n", "line 4: time_s must be a time from 0 on"),
        (
            START + "1,jetson-9,1,1\n",
            'line 4: there is no [[device]] "jetson-9"; the run file\'s are jetson-0, jetson-1',
        ),
        (START + "2,jetson-0,1,1\n1,jetson-1,1,1\n", "line 5: time_s goes back from 2 to 1; sort the rows by time"),
        (START + "1,jetson-0,1,1\n1,jetson-0,2,2\n", 'line 5: device "jetson-0" has two rows at 1 s'),
        (START + "0,jetson-1,1,1\n", 'line 4: device "jetson-1" has two rows at 0 s'),
        (RATES + "0,jetson-0,1,1\n", 'has no row for device "jetson-1"'),
        (RATES + "0,jetson-0,1,1\n1,jetson-1,1,1\n", 'line 3: device "jetson-1" starts at 1 s; it must be covered'),
        (START + "1,jetson-0,0,1\n", "line 4: down_bits_per_s 0 is a rate of 0 bit/s; it must be above 0"),
        (START + "1,jetson-0,1,nan\n", "line 4: up_bits_per_s nan is a rate of nan bit/s"),
        (
            START + "1,jetson-0,1,1e13\n",
            "line 4: up_bits_per_s 1e13 is a rate of 1e+13 bit/s; it must be above 0 and at most",
        ),
        (SNRS + "0,jetson-0,-inf,1\n", "line 2: snr_down_db -inf is a rate of 0 bit/s"),
        (SNRS + "0,jetson-0,1,1e300\n", "line 2: snr_up_db 1e300 is a rate of"),
        (START + '1,"jetson-0,1,1\n', "line 4: not valid CSV"),
    ],
)
def test_a_bad_trace_is_one_line_with_file_and_line(tmp_path: Path, text: str, line: str) -> None:
    assert refusal(tmp_path, text).startswith(line)


def test_a_gap_is_refused_inside_and_at_the_end(tmp_path: Path) -> None:
    inside = START + "5,jetson-0,1,1\n5,jetson-1,1,1\n15.5,jetson-0,1,1\n15.5,jetson-1,1,1\n"
    told = refusal(tmp_path, inside)
    assert told == (
        'line 6: device "jetson-0" has no row between 5 and 15.5 s; fill the gap, or raise radio.trace_max_gap_s (10)'
    )
    assert trace(tmp_path, inside, trace_max_gap_s=11.0).end_s == 15.5
    at_the_end = START + "5,jetson-0,1,1\n5,jetson-1,1,1\n8,jetson-0,1,1\n12,jetson-0,1,1\n"
    assert refusal(tmp_path, at_the_end, trace_max_gap_s=6.0).startswith('line 5: device "jetson-1" has no row')


def test_a_file_that_cannot_be_read_as_text_is_refused(tmp_path: Path) -> None:
    section = RadioSection()
    (tmp_path / "trace.csv").write_bytes(RATES.encode() + b"0,jetson-\xff,1,1\n")
    for path, told in [("trace.csv", "not UTF-8"), ("none.csv", "no such file"), ("", "cannot be read")]:
        with pytest.raises(ConfigError, match=told):
            TraceChannel(tmp_path / path, NAMES, section)
