"""`testbed simulate` beside a run of the same file: same model, same routing, and times that no round beats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, run, run_file

from testbed.cli import main
from testbed.config import load_run_file
from testbed.errors import ConfigError
from testbed.simulation.simulate import default_draws, simulate

pytestmark = [pytest.mark.torch]

DEVICES = [f"emulated_flops_per_s = {speed}\ndistance_m = {far}" for speed, far in (("6e12", 60.0), ("1e12", 250.0))]
SETTING = """
[radio]
fading = "rician"

[emulation]
as_if_width = 4096
as_if_inner = 14336

[estimator]
estimates = "oracle"

[placement]
jetson-0 = [0, 1, 2, 3]
jetson-1 = [4, 5, 6, 7]

[workload]
score_prompts = 2
score_tokens = 32
generate_prompts = 0
"""
POLICIES = ['name = "topk"', 'name = "wlr"\ntheta = 0.3']
LATE = 'name = "drop_late"\nk_min = 1\nafter_s = 0.0'
BLOCKS = 2 * 4  # prompts, layers


def document_of(folder: Path, *arguments: str) -> dict[str, Any]:
    done = run([TESTBED, *arguments, "--json"], folder, within_s=100)
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulate")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return run_file(folder, SETTING, devices=DEVICES, policies=POLICIES)


@pytest.fixture(scope="module")
def measured(folder: Path, file: Path) -> dict[str, Any]:
    return document_of(folder, "run", str(file))


def test_a_simulation_predicts_as_well_as_the_run_that_it_stands_for(
    folder: Path, file: Path, measured: dict[str, Any]
) -> None:
    simulated = document_of(folder, "simulate", str(file), "--draws", "50")
    assert (simulated["kind"], simulated["blocks"], simulated["draws"]) == ("simulated", BLOCKS, 50)
    assert simulated["perplexity_from"] == "measured in process"
    for mine, theirs in zip(simulated["rows"], measured["rows"], strict=True):
        assert mine["policy"] == theirs["policy"]
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)
        assert mine["accuracy"] == theirs["accuracy"]
    topk, wlr = simulated["rows"]
    assert (topk["prefill_cut"], topk["kept_fraction"], topk["dropped_mass"]) == (0, 1, 0)
    assert wlr["prefill_cut_low"] <= wlr["prefill_cut"] <= wlr["prefill_cut_high"]
    assert wlr["kept_fraction"] < 1


def test_the_routing_of_a_recorded_run_is_the_gates_own(file: Path, measured: dict[str, Any]) -> None:
    config = load_run_file(file)
    recorded = simulate(config, draws=5, quality=False, routing=Path(measured["directory"]))
    own = simulate(config, draws=5, quality=False)
    assert recorded.rows[0].perplexity != recorded.rows[0].perplexity, "unknown"
    for name in ("prefill_block_sum_s", "eq8_sum_s", "kept_fraction", "prefill_cut", "dropped_mass"):
        values = [[getattr(row, name) for row in results.rows] for results in (recorded, own)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_no_measured_round_beats_its_simulated_time(folder: Path, measured: dict[str, Any]) -> None:
    checked = document_of(folder, "simulate", "--check", measured["directory"])
    assert [row["rounds"] for row in checked["rows"]] == [BLOCKS, BLOCKS]
    for row in checked["rows"]:
        assert row["phase"] == "prefill"
        assert 0 < row["simulated_p50_s"] <= row["measured_p50_s"] * 1.01


def test_who_is_late_costs_quality_and_the_block_ends_without_them(folder: Path) -> None:
    (folder / "late").mkdir()
    eight = [f"emulated_flops_per_s = {n + 1}e12\ndistance_m = 60.0" for n in range(8)]
    one_each = SETTING.replace("jetson-0 = [0, 1, 2, 3]", "").replace("jetson-1 = [4, 5, 6, 7]", "")
    setting = one_each.replace("[placement]", "")
    config = load_run_file(run_file(folder / "late", setting, devices=eight, policies=[POLICIES[0], LATE]))
    topk, late = simulate(config, draws=2).rows
    assert late.prefill_cut > 0
    assert late.kept_fraction < 1
    assert late.orphaned_fraction == 0
    assert late.perplexity != topk.perplexity


def test_policies_that_are_asked_one_by_one_meet_fewer_draws_unless_told(file: Path) -> None:
    assert default_draws(load_run_file(file)) == 10_000
    config = load_run_file(file)
    specs = (config.policies[0], config.policies[1].model_validate({"name": "load_aware", "budget": 0.02}))
    assert default_draws(config.model_copy(update={"policies": specs})) < 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name either a run file or, with --check"),
        (["--check", "."], "name the folder of a run"),
        (["run.toml", "--placements", "2"], "add [radio.placement]"),
        (["run.toml", "--routing", "nowhere"], "name the folder of a run"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, file: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(["simulate", *arguments]) != 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert said in told.err


def test_every_placement_needs_a_draw(file: Path) -> None:
    with pytest.raises(ConfigError, match="needs at least one"):
        simulate(load_run_file(file), draws=2, placements=3)
