"""`testbed probe` as a user types it: what it fits is what the run file emulates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, run_file, started

from testbed.runlog.reader import read_events

pytestmark = [pytest.mark.torch]

SETTING = """
[radio]
fading = "none"

[emulation]
as_if_width = 4096
as_if_inner = 14336
"""
ROW_FLOP = 4 * 4096 * 14336 + 2 * 4096 * 14336 + 5 * 14336  # Eq. 4
SPEEDS = (4e12, 2e12, 1e12, 0.5e12)
DEVICES = [f"emulated_flops_per_s = {speed}\ndistance_m = {100 * (i % 4 + 1)}.0" for i, speed in enumerate(SPEEDS * 2)]


def probed(folder: Path) -> tuple[dict[str, Any], Path]:
    folder.mkdir()
    file = run_file(folder, SETTING, devices=DEVICES)
    argv = [TESTBED, "probe", str(file), "--rows", "1", "--rows", "8", "--rows", "32", "--repeats", "4", "--json"]
    with started(argv, folder) as command:
        done = command.finish(90)
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    run_dir = Path(document["directory"])
    assert [(device["answered"], device["unanswered"]) for device in document["devices"]] == [(12, 0)] * len(DEVICES)
    assert json.loads((run_dir / "probe.json").read_text())["devices"] == document["devices"]
    assert 0 < document["decode_block_s"] < document["prefill_block_s"]
    return document, run_dir


def worst_errors(document: dict[str, Any], run_dir: Path) -> tuple[float, float]:
    """The largest, of a node's seconds per row, and of a link's per byte: both ways, one has the clocks' error."""
    (channel,) = [event for event in read_events(run_dir) if event["kind"] == "channel"][:1]
    compute, link = [], []
    for index, device in enumerate(document["devices"]):
        fit = device["fit"]
        compute.append(abs(fit["compute"]["per"] / (ROW_FLOP / (SPEEDS * 2)[index]) - 1))
        true_byte_s = 8 / channel["down_bits_per_s"][index] + 8 / channel["up_bits_per_s"][index]
        link.append(abs((fit["down"]["per"] + fit["up"]["per"]) / true_byte_s - 1))
    return max(compute), max(link)


def test_the_fit_of_every_link_and_node_is_what_the_run_file_emulates(tmp_path: Path) -> None:
    for attempt in range(3):  # on a machine that is busy for a moment one would probe again
        compute_error, link_error = worst_errors(*probed(tmp_path / str(attempt)))
        if compute_error <= 0.1 and link_error <= 0.15:
            break
    assert compute_error <= 0.1
    assert link_error <= 0.15


@pytest.mark.parametrize("rows", ["0", "-1", "70000"])
def test_impossible_rows_are_one_line(tmp_path: Path, rows: str) -> None:
    with started([TESTBED, "probe", str(run_file(tmp_path)), "--rows", rows], tmp_path) as command:
        done = command.finish(30)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: --rows {rows}: from 1 to 65536 rows make a block"]
