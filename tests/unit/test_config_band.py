"""What a run file may say of the band, of what policies are steered to, and of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_texts import LEAST, PLACED, TOPK, load, refusal

OPTIMAL = '[[policy]]\nname = "topk"\nbandwidth = "optimal"\n'
JOINT = '[[policy]]\nname = "joint"\nbudget = 0.05\n'
TRACED = '[radio]\ntrace = "rates.csv"\n'
REAL = '[[device]]\nname = "jetson-1"\naddress = "192.168.1.11"\n'
SHAPING = '[shaping]\ninterface = "wlan0"\nbits_per_s = 100e6\n'


def test_how_the_band_is_shared_out_is_no_parameter_of_the_policy(tmp_path: Path) -> None:
    config = load(tmp_path, f'{LEAST}{PLACED}{OPTIMAL}period = "prompt"\n{JOINT}')
    topk, optimal, joint = config.policies
    assert (topk.bandwidth, topk.period, topk.params) == ("even", "block", {})
    assert (optimal.bandwidth, optimal.period, optimal.params) == ("optimal", "prompt", {})
    assert (joint.bandwidth, joint.params) == ("even", {"budget": 0.05})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + OPTIMAL, 'policy "topk": there is no band to share out; it needs a [radio] without a trace'),
        (LEAST + PLACED + JOINT + 'bandwidth = "optimal"\n', "policy[1]: bandwidth: joint shares out the band by"),
        (LEAST + PLACED + '[[policy]]\nname = "wlr"\nperiod = "prompt"\n', "policy[1]: period: without effect"),
        (LEAST + TRACED + OPTIMAL, 'policy "topk": there is no band to share out; it needs a [radio] without a trace'),
        (
            f'{LEAST}[radio]\nmedium = "shared"\n[radio.placement]\n{OPTIMAL}',
            "a link has the whole band while it is on",
        ),
        (LEAST + PLACED + OPTIMAL.replace("optimal", "optimum"), "policy[1].bandwidth: "),
        (LEAST + PLACED + OPTIMAL + 'period = "round"\n', "policy[1].period: "),
        (LEAST + PLACED + OPTIMAL + OPTIMAL, 'policy: "topk" stands there twice with the same parameters; remove one'),
        (LEAST + PLACED + SHAPING, "shaping: is for real links; remove it, or [radio]"),
        (LEAST + SHAPING, 'shaping: device "jetson-0" needs address, the IPv4 address of its board'),
        (
            f'name = "small"\n{REAL}{TOPK}{SHAPING}[csi]\nsource = "reported"\n',
            'csi.source: "reported" needs a [radio]',
        ),
        (f'name = "small"\n{REAL}{TOPK}{SHAPING.replace("wlan0", "wlan0; rm")}', "shaping.interface: "),
        (f'name = "small"\n{REAL}{TOPK}{SHAPING.replace("100e6", "1")}', "shaping.bits_per_s: "),
        (
            f'name = "small"\n{REAL.replace("192.168.1.11", "board")}{TOPK}{SHAPING}',
            "device[0].address: must be one IPv4",
        ),
        (LEAST + '[csi]\nsource = "guessed"\n', "csi.source: "),
        (LEAST + "[csi]\nerror_db = -1\n", "csi.error_db: "),
        (LEAST + "[steering]\ntarget_ms = 0\n", "steering.target_ms: "),
        (LEAST + "[steering]\nquality_budget = 1.5\n", "steering.quality_budget: "),
        (LEAST + "[steering]\ntarget = 5\n", "steering.target: unknown key; did you mean"),
    ],
)
def test_a_band_that_cannot_be_shared_out_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize("medium", ["fdd", "tdd"])
def test_a_band_can_be_shared_out_where_links_have_parts_of_it(tmp_path: Path, medium: str) -> None:
    radio = f'[radio]\nmedium = "{medium}"\n[radio.placement]\n'
    assert load(tmp_path, LEAST + radio + OPTIMAL + JOINT).policies[1].bandwidth == "optimal"


def test_rates_of_real_links_can_be_shared_out_too(tmp_path: Path) -> None:
    config = load(tmp_path, f'name = "small"\n{REAL}{TOPK}{OPTIMAL}{JOINT}{SHAPING}')
    assert config.shaping is not None
    assert (config.shaping.interface, config.shaping.bits_per_s) == ("wlan0", 100e6)
    assert config.devices[0].address == "192.168.1.11"


def test_steering_is_wanted_where_it_has_a_goal(tmp_path: Path) -> None:
    assert not load(tmp_path, LEAST).steering.wanted
    steering = load(tmp_path, LEAST, "steering.target_ms=5", "steering.quality_budget=0.02").steering
    assert (steering.target_ms, steering.quality_budget, steering.wanted) == (5.0, 0.02, True)


def test_a_run_takes_no_notice_of_the_axes_of_a_sweep(tmp_path: Path) -> None:
    swept = load(tmp_path, f'{LEAST}[sweep]\n"seed" = [1, 2]\n')
    assert swept.sweep == {"seed": [1, 2]}
    assert swept.model_copy(update={"sweep": None}) == load(tmp_path, LEAST)
