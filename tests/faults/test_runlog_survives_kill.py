"""A real recorder process is killed with SIGKILL at a random point, again and again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.runlog.reader import read_events, read_table
from testbed.runlog.seal import seal_run

DEVICES, TOKENS, SEGMENT_ROWS = 4, 3, 400

RECORD_FOREVER = f"""
import os, sys
from itertools import count
from pathlib import Path
import numpy as np
from testbed.runlog.recorder import Recorder
from testbed.runlog.columns import ROUND_COLUMNS

rows = {{c.name: 0 for c in ROUND_COLUMNS if not c.nullable and c.name not in ("device", "tokens")}}
rows["dilation"] = 1
shape = ({TOKENS}, 2)
tokens = {{name: np.zeros(shape) for name in ("expert", "asked", "weight", "kept", "device", "final_weight")}}
names = [str(n) for n in range({DEVICES})]
recorder = Recorder(Path(sys.argv[1]), "run", names, top_k=2, experts=0, segment_rows={SEGMENT_ROWS})
for number in count():
    recorder.record_round(
        {{**rows, "round": number, "rtt_ns": np.arange({DEVICES}) + 10 * number, "round_ns": number}},
        {{**tokens, "orphaned": False, "weight": np.full(shape, number)}},
    )
    if number % 100 == 0:
        recorder.event("hundred", number=number)
    os.write(1, b"%d\\n" % number)
"""


def record_until_killed(run_dir: Path, acknowledged: int) -> int:
    """Kill the recorder after it acknowledged that many rounds; returns the last round it acknowledged at all."""
    command = [sys.executable, "-c", RECORD_FOREVER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(acknowledged):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        last = acknowledged - 1
        *lines, _ = process.stdout.read().split(b"\n")
    assert process.returncode == -signal.SIGKILL
    return int(lines[-1]) if lines else last


@pytest.mark.parametrize("seed", range(5))
def test_kill_9_loses_no_acknowledged_row(tmp_path: Path, seed: int) -> None:
    last = record_until_killed(tmp_path, acknowledged=random.Random(seed).randint(1, 1500))
    live = {table: read_table(tmp_path, table) for table in ("rounds", "tokens")}
    rounds, tokens = live["rounds"], live["tokens"]
    assert last + 1 <= rounds.num_rows // DEVICES
    whole = rounds.num_rows // DEVICES
    assert whole <= last + 2, "at most the round under way is there without having been acknowledged"
    assert tokens.num_rows >= whole * TOKENS, "a round that has its device rows has its tokens"
    assert rounds["round"].to_pylist() == [row // DEVICES for row in range(rounds.num_rows)]
    assert rounds["rtt_ns"].to_pylist() == [10 * (row // DEVICES) + row % DEVICES for row in range(rounds.num_rows)]
    assert tokens["weight"].to_pylist() == [[row // TOKENS] * 2 for row in range(tokens.num_rows)]
    assert len(read_events(tmp_path)) >= last // 100 + 1

    seal_run(tmp_path)
    assert not list(tmp_path.glob("*.seg*"))
    for table, before in live.items():
        assert read_table(tmp_path, table).equals(before)
