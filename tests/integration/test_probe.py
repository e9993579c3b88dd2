"""`testbed probe` as a user types it: what it fits is what the run file emulates."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

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


def test_the_fit_of_links_and_nodes_is_what_the_run_file_emulates_in_the_median_of_the_devices(tmp_path: Path) -> None:
    file = run_file(tmp_path, SETTING, devices=DEVICES)
    argv = [TESTBED, "probe", str(file), "--rows", "1", "--rows", "8", "--rows", "32", "--repeats", "4", "--json"]
    with started(argv, tmp_path) as command:
        done = command.finish(90)
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout.splitlines()[-1])
    run_dir = Path(document["directory"])
    (channel,) = [event for event in read_events(run_dir) if event["kind"] == "channel"][:1]
    compute_error, link_error = [], []  # a machine that is busy for a moment spoils the fit of one device
    for index, device in enumerate(document["devices"]):
        fit = device["fit"]
        assert (device["answered"], device["unanswered"]) == (12, 0)
        compute_error.append(abs(fit["compute"]["per"] / (ROW_FLOP / (SPEEDS * 2)[index]) - 1))
        # one way the two clocks may be wrong by their bound, both ways together not
        link_row_s = 4100 * (fit["down"]["per"] + fit["up"]["per"])
        true_row_s = 8 * 4100 * (1 / channel["down_bits_per_s"][index] + 1 / channel["up_bits_per_s"][index])
        link_error.append(abs(link_row_s / true_row_s - 1))
    assert median(compute_error) < 0.1
    assert median(link_error) < 0.15
    assert json.loads((run_dir / "probe.json").read_text())["devices"] == document["devices"]
    assert 0 < document["decode_block_s"] < document["prefill_block_s"]


@pytest.mark.parametrize("rows", ["0", "-1", "70000"])
def test_impossible_rows_are_one_line(tmp_path: Path, rows: str) -> None:
    with started([TESTBED, "probe", str(run_file(tmp_path)), "--rows", rows], tmp_path) as command:
        done = command.finish(30)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: --rows {rows}: from 1 to 65536 rows make a block"]
