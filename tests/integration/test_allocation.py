"""A run that shares out the band for every block: the relay carries what was asked for, and no answer changes."""

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
from testbed.policies.bandwidth import block_time_s
from testbed.policies.base import Air, State
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import GenerationPhase

pytestmark = [pytest.mark.torch]

BAND_HZ, ROW_BITS = 100e6, 8 * 4100  # int8 rows of 4096 with their scale
SPEEDS = ("20e12", "10e12", "6e12", "4e12", "2.5e12", "1.6e12", "1e12", "0.6e12")
DEVICES = [f"emulated_flops_per_s = {speed}\ndistance_m = {60 + 50 * i}.0" for i, speed in enumerate(SPEEDS)]
POLICIES = ('name = "topk"', 'name = "topk"\nbandwidth = "optimal"', 'name = "joint"\nbudget = 0.05')
EVEN, OPTIMAL, JOINT = range(3)
SETTING = """
[radio]
fading = "none"
bandwidth_hz = 100e6

[csi]
source = "reported"

[emulation]
as_if_width = 4096
as_if_inner = 14336
dilation = {dilation}

[workload]
score_prompts = 3
score_tokens = 64
generate_prompts = 0
"""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Allocated:
    """A finished run: one value per (round, device) in every column."""

    document: dict[str, Any]
    columns: dict[str, Floats]
    truth: LinkTruth

    def __getitem__(self, name: str) -> Floats:
        return self.columns[name]

    def rounds_of(self, policy: int, from_prompt: int = 0) -> list[NDArray[np.intp]]:
        """The rows of each round of a policy, one per device, of rounds in which this machine was not busy."""
        mine = (self["policy"] == policy) & (self["prompt"] >= from_prompt)
        numbers = np.unique(self["round"][mine])
        rows = [np.flatnonzero(self["round"] == number) for number in numbers]
        kept = [at for at in rows if self["round_ns"][at[0]] <= (1 + OVERRUN_ABOVE) * self[PATH][at].max()]
        assert len(kept) > len(rows) / 2
        return kept

    def sent_in(self, rounds: list[NDArray[np.intp]]) -> NDArray[np.intp]:
        at = np.concatenate(rounds)
        return at[(self["rows"][at] > 0) & (self["status"][at] == 1)]


def run(folder: Path, dilation: float) -> Allocated:
    file = run_file(folder, SETTING.format(dilation=dilation), devices=DEVICES, policies=POLICIES)
    with started([TESTBED, "run", str(file), "--json"], folder) as command:
        done = command.finish(120)
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout.splitlines()[-1])
    run_dir = Path(document["directory"])
    rounds = read_table(run_dir, "rounds")
    truth = link_truth(run_dir, rounds)
    assert truth is not None
    rounds = with_emulated_times(run_dir, rounds, read_manifest(run_dir), read_events(run_dir))
    columns = {name: rounds[name].to_numpy(zero_copy_only=False).astype(float) for name in rounds.column_names}
    return Allocated(document, columns, truth)


@pytest.fixture(scope="module")
def allocated(tmp_path_factory: pytest.TempPathFactory) -> Allocated:
    """What a user does whose result says INVALID because the machine was busy: stretch time further."""
    folder = tmp_path_factory.mktemp("allocated")
    for dilation in (5.0, 10.0, 20.0):
        found = run(folder, dilation)
        if found.document["valid"]:
            break
    return found


def median_error(found: Floats, truth: Floats) -> float:
    return float(np.median(np.abs(found / truth - 1)))


def test_allocation_alone_changes_no_answer(allocated: Allocated) -> None:
    even, optimal, _ = allocated.document["rows"]
    assert optimal["perplexity"] == even["perplexity"]
    assert optimal["kept_fraction"] == even["kept_fraction"] == 1.0
    assert (optimal["bandwidth"], optimal["period"], optimal["dropped_mass"]) == ("optimal", "block", 0.0)


def test_joint_spends_no_more_than_its_budget(allocated: Allocated) -> None:
    joint = allocated.document["rows"][JOINT]
    assert 0 < joint["dropped_mass"] <= 0.05 + 1e-6


@pytest.mark.parametrize("policy", [EVEN, OPTIMAL, JOINT])
def test_the_shares_of_every_round_are_the_whole_band(allocated: Allocated, policy: int) -> None:
    hz_RN = allocated["bandwidth_hz"][allocated["policy"] == policy].reshape(-1, len(DEVICES))
    assert hz_RN.sum(axis=1) == pytest.approx(np.full(len(hz_RN), BAND_HZ), rel=1e-5)
    assert (hz_RN > 0).all()
    even = np.allclose(hz_RN, BAND_HZ / len(DEVICES))
    assert even == (policy == EVEN)


@pytest.mark.parametrize("policy", [EVEN, OPTIMAL, JOINT])
@pytest.mark.parametrize("way", ["down", "up"])
def test_links_carry_the_rates_that_were_asked_for(allocated: Allocated, policy: int, way: str) -> None:
    """Asked for by what devices reported, carried by the relay, and measured between the two programs."""
    sent = allocated.sent_in(allocated.rounds_of(policy))
    asked = allocated[f"asked_{way}_bits_per_s"][sent]
    air_s = getattr(allocated.truth, f"{way}_air_ns")[sent] / allocated["dilation"][sent] / 1e9
    assert median_error(8 * allocated[f"bytes_{way}"][sent] / air_s, asked) < 0.05
    assert median_error(allocated[f"measured_{way}_bits_per_s"][sent], asked) < 0.15


@pytest.mark.parametrize("policy", [OPTIMAL, JOINT])
@pytest.mark.parametrize("way", ["down", "up"])
def test_predictions_stay_right_while_shares_change_from_block_to_block(
    allocated: Allocated, policy: int, way: str
) -> None:
    sent = allocated.sent_in(allocated.rounds_of(policy, from_prompt=1))
    truth_s = getattr(allocated.truth, f"{way}_ns")[sent] / allocated["dilation"][sent] / 1e9
    assert median_error(allocated[f"predicted_{way}_s"][sent], truth_s) < 0.15


def predicted_block_s(run: Allocated, at: NDArray[np.intp]) -> float:
    """By what the policy saw and the shares that it asked for."""
    base_s_N, expert_s_N, row_s_N = (run[f"state_{name}_s"][at] for name in ("base", "expert", "row"))
    share_N = run["bandwidth_hz"][at] / BAND_HZ
    asked_WN = np.stack([run[f"asked_{way}_bits_per_s"][at] for way in ("down", "up")])
    snr_hz_WN = np.array(
        [[snr_hz(*link) for link in zip(rate_N, share_N * BAND_HZ, strict=True)] for rate_N in asked_WN]
    )
    even_hz = BAND_HZ / len(at)
    air = Air(BAND_HZ, snr_hz_WN, ROW_BITS / (even_hz * np.log2(1 + snr_hz_WN / even_hz)))
    rows_N, experts_N = run["rows"][at].astype(int), run["experts_touched"][at].astype(int)
    state = State(row_s_N, np.ones(len(at), bool), base_s_N, base_s_N, expert_s_N, row_s_N, air)
    return block_time_s(rows_N, experts_N, state, share_N)


def snr_hz(bits_per_s: float, band_hz: float) -> float:
    """The quality of a link that carries so much with so much band."""
    return float(band_hz * (2 ** (bits_per_s / band_hz) - 1))


@pytest.mark.parametrize("policy", [EVEN, OPTIMAL, JOINT])
def test_a_blocks_time_is_predicted_under_the_shares_it_gets(allocated: Allocated, policy: int) -> None:
    rounds = allocated.rounds_of(policy, from_prompt=1)
    predicted_s = np.array([predicted_block_s(allocated, at) for at in rounds])
    measured_s = np.array([allocated["round_ns"][at[0]] / allocated["dilation"][at[0]] / 1e9 for at in rounds])
    assert median_error(predicted_s, measured_s) < 0.15


def test_blocks_are_faster_with_the_band_shared_out_and_faster_still_when_pairs_are_dropped_for_it(
    allocated: Allocated,
) -> None:
    """By what links and devices themselves took, which this machine's own speed has no part in."""
    asked_s = [
        float(
            np.median([allocated[PATH][at].max() / allocated["dilation"][at[0]] for at in allocated.rounds_of(policy)])
        )
        for policy in (EVEN, OPTIMAL, JOINT)
    ]
    assert asked_s[OPTIMAL] < asked_s[EVEN]
    assert asked_s[JOINT] < asked_s[OPTIMAL]


def test_only_prefill_was_asked_for(allocated: Allocated) -> None:
    assert (allocated["phase"] == GenerationPhase.PREFILL).all()
