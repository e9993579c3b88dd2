"""A run over emulated links: what it measures is what the relay and the nodes really did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from numpy.typing import NDArray
from processes import TESTBED, run_file, started

from testbed.experiment.emulated_time import OVERRUN_ABOVE, PATH, with_emulated_times
from testbed.experiment.truth import LinkTruth, link_truth
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import GenerationPhase

pytestmark = [pytest.mark.torch]

SPEEDS = ("20e12", "10e12", "6e12", "4e12", "2.5e12", "1.6e12", "1e12", "0.6e12")
DEVICES = [f"emulated_flops_per_s = {speed}\ndistance_m = {60 + 50 * i}.0" for i, speed in enumerate(SPEEDS)]
SETTING = """
[radio]
fading = "{fading}"

[emulation]
as_if_width = 4096
as_if_inner = 14336
dilation = {dilation}
decode_dilation = {decode_dilation}

[workload]
score_prompts = {prompts}
score_tokens = 64
generate_prompts = 1
prompt_tokens = 16
new_tokens = 8
"""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EmulatedRun:
    """A finished run's rows that were sent something and answered, with what the links really did."""

    document: dict[str, Any]
    manifest: dict[str, Any]
    events: list[dict[str, Any]]
    columns: dict[str, Floats]
    truth: LinkTruth

    def __getitem__(self, name: str) -> Floats:
        return self.columns[name]

    def phase(self, phase: GenerationPhase) -> NDArray[np.bool_]:
        """The rows of a phase, without the rounds in which this machine was busy, as the run itself says."""
        slowest_ns = np.zeros(int(self["round"].max()) + 1)
        np.maximum.at(slowest_ns, self["round"].astype(int), self[PATH])
        kept_to_time = self["round_ns"] <= (1 + OVERRUN_ABOVE) * slowest_ns[self["round"].astype(int)]
        assert kept_to_time.mean() > 0.5
        chosen: NDArray[np.bool_] = kept_to_time & (self["rows"] > 0) & (self["status"] == 1) & (self["phase"] == phase)
        return chosen

    @property
    def residence_ns(self) -> Floats:
        return self["node_sent_ns"] - self["node_received_ns"]


def valid_run(folder: Path, fading: str, prompts: int) -> EmulatedRun:
    """What a user does whose result says INVALID because the machine was busy: stretch time further."""
    for dilation in (5.0, 10.0, 20.0):
        found = run(folder, fading, prompts, dilation)
        if found.document["valid"]:
            break
    return found


def run(folder: Path, fading: str, prompts: int, dilation: float) -> EmulatedRun:
    setting = SETTING.format(fading=fading, prompts=prompts, dilation=dilation, decode_dilation=8 * dilation)
    file = run_file(folder, setting, devices=DEVICES)
    with started([TESTBED, "run", str(file), "--json"], folder) as command:
        done = command.finish(120)
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout.splitlines()[-1])
    run_dir = Path(document["directory"])
    rounds = read_table(run_dir, "rounds")
    truth = link_truth(run_dir, rounds)
    assert truth is not None
    manifest, events = read_manifest(run_dir), read_events(run_dir)
    rounds = with_emulated_times(run_dir, rounds, manifest, events)
    columns = {name: rounds[name].to_numpy(zero_copy_only=False).astype(float) for name in rounds.column_names}
    return EmulatedRun(document, manifest, events, columns, truth)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> EmulatedRun:
    return valid_run(tmp_path_factory.mktemp("static"), "none", 5)


@pytest.fixture(scope="module")
def fading(tmp_path_factory: pytest.TempPathFactory) -> EmulatedRun:
    return valid_run(tmp_path_factory.mktemp("fading"), "rayleigh", 8)


def median(values: Floats) -> float:
    return float(np.median(values))


@pytest.mark.parametrize("phase", GenerationPhase)
def test_the_relays_record_and_the_nodes_times_are_the_round_trip(static: EmulatedRun, phase: GenerationPhase) -> None:
    mine = static.phase(phase)
    explained_ns = static.truth.down_ns + static.residence_ns + static.truth.up_ns
    assert median(np.abs(explained_ns / static["rtt_ns"] - 1)[mine]) < 0.05


@pytest.mark.parametrize("phase", GenerationPhase)
def test_a_nodes_residence_is_the_sum_of_its_phases(static: EmulatedRun, phase: GenerationPhase) -> None:
    """Nothing is defined as the rest of something else: the parts are measured one by one."""
    mine = static.phase(phase)
    names = ("node_queue_ns", "node_dequantise_ns", "node_compute_ns", "node_quantise_ns")
    parts_ns = sum(static[name] for name in names)
    assert median(np.abs(parts_ns / static.residence_ns - 1)[mine]) < 0.05


@pytest.mark.parametrize("way", ["down", "up"])
def test_one_way_times_agree_with_the_relay_in_prefill_and_contain_it_in_their_bound_always(
    static: EmulatedRun, way: str
) -> None:
    measured_ns, true_ns = static[f"{way}_ns"], getattr(static.truth, f"{way}_ns")
    mine = static.phase(GenerationPhase.PREFILL)
    assert median(np.abs(measured_ns / true_ns - 1)[mine]) < 0.05
    sent = static["rows"] > 0
    error_ns, bound_ns = (measured_ns - true_ns)[sent], static["clock_bound_ns"][sent]
    # Never too short; too long only by what the receiver took to read what the relay had let go of.
    assert (error_ns >= -bound_ns - 1).all()
    assert median(error_ns - bound_ns) < 0


def test_the_true_offset_of_nodes_on_this_machine_is_inside_the_bound_in_every_round(static: EmulatedRun) -> None:
    sent = static["rows"] > 0
    assert (np.abs(static["clock_offset_s"][sent]) * 1e9 <= static["clock_bound_ns"][sent] + 1).all()


def error_of_predictions(run: EmulatedRun, part: str, phase: GenerationPhase) -> float:
    """Median over the rounds from the second prompt on, against what relay and node themselves say."""
    truth_ns = {"compute": run.residence_ns, "down": run.truth.down_ns, "up": run.truth.up_ns}[part]
    mine = run.phase(phase) & (run["prompt"] >= 1)
    predicted_ns = run[f"predicted_{part}_s"] * run["dilation"] * 1e9
    return median(np.abs(predicted_ns / truth_ns - 1)[mine])


@pytest.mark.parametrize("part", ["compute", "down", "up"])
def test_predictions_are_within_10_percent_on_static_links_from_the_second_prompt_on(
    static: EmulatedRun, part: str
) -> None:
    assert error_of_predictions(static, part, GenerationPhase.PREFILL) < 0.10


@pytest.mark.parametrize("part", ["compute", "down", "up"])
def test_predictions_are_within_25_percent_under_fading_from_the_second_prompt_on(
    fading: EmulatedRun, part: str
) -> None:
    assert error_of_predictions(fading, part, GenerationPhase.PREFILL) < 0.25


@pytest.mark.parametrize("phase", GenerationPhase)
def test_what_a_policy_saw_says_a_round_trip_within_10_percent_on_static_links(
    static: EmulatedRun, phase: GenerationPhase
) -> None:
    seconds = (
        static["state_base_s"]
        + static["state_expert_s"] * static["experts_touched"]
        + static["state_row_s"] * static["rows"]
    )
    mine = static.phase(phase) & (static["prompt"] >= 1)
    assert median(np.abs(seconds * static["dilation"] * 1e9 / static["rtt_ns"] - 1)[mine]) < 0.10


def test_a_row_weighs_on_the_link_what_the_wider_models_would(static: EmulatedRun) -> None:
    mine = static.phase(GenerationPhase.PREFILL)
    bytes_a_row = static["bytes_down"][mine] / static["rows"][mine]
    assert (bytes_a_row >= 4096 + 4).all()
    assert median(bytes_a_row) < 4096 * 1.05


def test_compute_is_padded_to_the_emulated_devices_time_and_no_row_is_faster(static: EmulatedRun) -> None:
    mine = static.phase(GenerationPhase.PREFILL)
    row_s = np.array([static.manifest["emulated"][name]["row_s"] for name in static.manifest["devices"]])
    asked_ns = row_s[static["device"].astype(int)] * static["rows"] * static["dilation"] * 1e9
    assert (static["node_compute_ns"][mine] >= asked_ns[mine] * 0.999).all()


def test_every_policy_meets_the_same_channel(fading: EmulatedRun) -> None:
    channels = [event for event in fading.events if event["kind"] == "channel"]
    for prompt in {event["prompt"] for event in channels}:
        draws = [event["down_bits_per_s"] for event in channels if event["prompt"] == prompt]
        assert all(draw == draws[0] for draw in draws)
    firsts = {tuple(event["down_bits_per_s"]) for event in channels}
    assert len(firsts) == len({event["prompt"] for event in channels}), "every prompt has a channel of its own"


def test_the_document_says_what_is_emulated_and_how_much_was_overhead(static: EmulatedRun) -> None:
    assert "relay" in static.document["links"]
    assert set(static.document["emulated"]) == set(static.manifest["devices"])
    for row in static.document["rows"]:
        assert row["overhead_p50"] > 0
        assert 0 <= row["overrun_fraction"] <= 1
