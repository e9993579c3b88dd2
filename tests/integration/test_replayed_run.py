"""`testbed logs replay` of a run over emulated links: it reproduces what was decided and predicts what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, run, run_file

from testbed.cli import main

pytestmark = [pytest.mark.torch]

SPEEDS = ("4e12", "2e12", "1e12", "0.7e12")
DEVICES = [f"emulated_flops_per_s = {speed}\ndistance_m = {60 + 80 * i}.0" for i, speed in enumerate(SPEEDS)]
SETTING = """
[radio]
fading = "rician"

[csi]
source = "reported"

[emulation]
as_if_width = 4096
as_if_inner = 14336
dilation = 10.0
decode_dilation = 40.0

[workload]
score_prompts = 1
score_tokens = 40
generate_prompts = 1
prompt_tokens = 8
new_tokens = 3
"""
POLICIES = [
    'name = "topk"',
    'name = "wlr"\ntheta = 0.3',
    'name = "load_aware"\nbudget = 0.1',
    'name = "substitute"\nbudget = 0.1',
    'name = "joint"\nbudget = 0.1',
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("replay")
    file = run_file(folder, SETTING, devices=DEVICES, policies=POLICIES)
    done = run([TESTBED, "run", str(file), "--set", "log.scores=float32", "--json"], folder, within_s=100)
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.fixture(scope="module")
def validation(measured: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("validation")
    done = run([TESTBED, "logs", "replay", measured["directory"], "--validate", "--json"], folder)
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def test_every_decision_of_a_real_run_is_reproduced(validation: dict[str, Any]) -> None:
    rows = validation["reproduced"]
    assert [row["policy"].split()[0] for row in rows] == ["topk", "wlr", "load_aware", "substitute", "joint"]
    for row in rows:
        assert row["refused"] is None
        assert row["rounds"] > 0
        if row["exact_inputs"]:
            assert (row["same"], row["same_weights"]) == (row["rounds"], row["rounds"]), row["policy"]
    assert [row["exact_inputs"] for row in rows] == [True, True, True, True, False]
    assert validation["reproduces"]


def test_what_is_predicted_of_another_policy_is_what_really_running_it_took(validation: dict[str, Any]) -> None:
    claimed = [row for row in validation["predicted"] if row["claimed"]]
    assert {row["policy"].split()[0] for row in claimed} == {"wlr", "load_aware", "substitute", "joint"}
    assert {row["by"] for row in claimed} == {"channel"}
    for row in claimed:
        assert row["difference_p50"] <= validation["claim"], row
    assert validation["predicts"]


def test_a_policy_that_was_not_run_is_asked_of_the_recorded_rounds(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(measured["directory"])
    arguments = ["logs", "replay", run_dir.name, "--logs", str(run_dir.parent), "--policy", "oracle"]
    assert main([*arguments, "--param", "budget=0.1", "--json"]) == 0
    oracle = json.loads(capsys.readouterr().out.splitlines()[-1])
    prefill = oracle["phases"][0]
    assert prefill["dropped_mass"] <= 0.1 + 1e-6
    assert all(cut["cut"] > 0 for cut in prefill["predicted"])
