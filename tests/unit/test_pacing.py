from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetson_node.pacing import LARGEST, Pacing, write_factor
from testbed.errors import ConfigError
from testbed.latency.model import ComputeModel

MODEL = ComputeModel(base_s=0.5, expert_s=2.0, row_s=0.25)


@given(st.integers(1, 1000), st.integers(1, 8))
def test_without_a_factor_a_block_takes_what_its_model_says(rows: int, experts: int) -> None:
    assert Pacing(MODEL).seconds(rows, experts) == MODEL.seconds(rows, experts)


def test_bound_by_memory_or_by_arithmetic() -> None:
    assert Pacing(MODEL).seconds(1, 1) == 2.5
    assert Pacing(MODEL).seconds(100, 1) == 25.5
    assert Pacing(MODEL).seconds(0, 0) == 0.0


def test_a_new_factor_is_in_force_with_the_next_block(tmp_path: Path) -> None:
    file = tmp_path / "jetson-0.pace"
    write_factor(file, 1.0)
    pacing = Pacing(MODEL, file)
    for factor in (1.0, 50.0, 5.0, 0.0):
        write_factor(file, factor)
        assert pacing.seconds(1, 1) == 2.5 * factor


def test_a_factor_is_written_in_place(tmp_path: Path) -> None:
    file = tmp_path / "pace"
    write_factor(file, 1.0)
    inode = file.stat().st_ino
    write_factor(file, -2.5)
    assert file.stat().st_ino == inode  # a reader's mapping is of this very file
    assert file.read_bytes() == struct.pack("<d", -2.5)


def test_no_factor_makes_a_block_take_less_than_no_time(tmp_path: Path) -> None:
    file = tmp_path / "pace"
    write_factor(file, -3.0)
    assert Pacing(MODEL, file).seconds(4, 1) == 0.0


@pytest.mark.parametrize("factor", [-3.0, -1e-300, -math.inf, -0.0])
def test_a_negative_factor_is_none(tmp_path: Path, factor: float) -> None:
    file = tmp_path / "pace"
    write_factor(file, factor)
    assert Pacing(MODEL, file).seconds(4, 1) == 0.0


def test_a_factor_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pace"
    write_factor(file, math.nan)
    assert Pacing(MODEL, file).seconds(1, 1) == 2.5


@pytest.mark.parametrize("factor", [1e10, 1e308, math.inf])
def test_a_huge_factor_is_limited(tmp_path: Path, factor: float) -> None:
    file = tmp_path / "pace"
    write_factor(file, factor)
    assert Pacing(MODEL, file).seconds(1, 1) == 2.5 * LARGEST


@given(st.binary(min_size=8, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_the_file_a_block_takes_a_time(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "pace"
    file.write_bytes(content)
    assert 0 <= Pacing(MODEL, file).seconds(4, 2) < math.inf


def test_without_a_model_nothing_is_emulated(tmp_path: Path) -> None:
    file = tmp_path / "pace"
    write_factor(file, 100.0)
    for pacing in (Pacing(None), Pacing(None, file)):
        assert pacing.seconds(1000, 8) == 0.0
        assert pacing.told() == {}


def test_the_base_station_hears_of_the_model_before_any_factor(tmp_path: Path) -> None:
    file = tmp_path / "pace"
    write_factor(file, 100.0)
    assert Pacing(MODEL, file).told() == {"base_s": 0.5, "expert_s": 2.0, "row_s": 0.25}


@pytest.mark.parametrize("content", [None, b"", b"1.0", bytes(7)])
def test_a_missing_or_too_short_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "pace"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Pacing(MODEL, file)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"--pace-file {file}: not a file of one number")


def test_a_folder_is_no_pace_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file of one number"):
        Pacing(MODEL, tmp_path)
