"""A device that is ten times slower for some prompts is avoided while it is, and used again when it has recovered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from numpy.typing import NDArray
from processes import TESTBED, run_file, started

from testbed.runlog.reader import read_table

pytestmark = [pytest.mark.torch]

SLOW, THROTTLED_FROM, RECOVERED_AT, PROMPTS = 1, 4, 8, 14
SETTING = f"""
[radio]
fading = "none"

[emulation]
as_if_width = 4096
as_if_inner = 14336
dilation = 2.0

[[throttle]]
device = "jetson-{SLOW}"
from_prompt = {THROTTLED_FROM}
until_prompt = {RECOVERED_AT}
factor = 10.0

[estimator]
probe_after_s = 0.5

[workload]
score_prompts = {PROMPTS}
score_tokens = 48
generate_prompts = 0
"""
DEVICES = ["emulated_flops_per_s = 1e12\ndistance_m = 100.0"] * 8


def share_sent(run_dir: Path) -> NDArray[np.float64]:
    """Per prompt under the last policy: of the pairs that the gate gave the slow device, how many were sent."""
    tokens = read_table(run_dir, "tokens")
    policy, prompt = tokens["policy"].to_numpy(), tokens["prompt"].to_numpy()
    expert_TK, device_TK = (np.stack(tokens[name].to_numpy(zero_copy_only=False)) for name in ("expert", "device"))
    last = policy == policy.max()
    routed_TK, sent_TK = expert_TK == SLOW, (expert_TK == SLOW) & (device_TK == SLOW)
    return np.array([
        sent_TK[last & (prompt == p)].sum() / routed_TK[last & (prompt == p)].sum() for p in range(PROMPTS)
    ])  # fmt: skip


def test_a_device_ten_times_slower_is_avoided_within_a_prompt_and_used_again_within_five_of_its_recovery(
    tmp_path: Path,
) -> None:
    file = run_file(tmp_path, SETTING, devices=DEVICES, policies=['name = "topk"', 'name = "wlr"\ntheta = 0.3'])
    with started([TESTBED, "run", str(file), "--json"], tmp_path) as command:
        done = command.finish(120)
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    share = share_sent(Path(json.loads(done.stdout.splitlines()[-1])["directory"]))
    usual = share[:THROTTLED_FROM].mean()
    # about half is left: pairs whose weight is worth ten times the wait
    assert (share[THROTTLED_FROM + 1 : RECOVERED_AT] < 0.65 * usual).all(), share
    assert share[RECOVERED_AT : RECOVERED_AT + 5].max() > 0.8 * usual, share
    assert share[RECOVERED_AT + 5 :].mean() > 0.8 * usual, share
