"""Draws of the channel as arrays are the channel's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splits import write_split

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest
from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.experiment.emulation import compute_model, make_channel, row_bytes
from testbed.latency.known import KnownLatencies
from testbed.simulation.draws import draw_channel, draw_placements

NEAR, FAR = (
    {"emulated_flops_per_s": 1e9, "emulated_memory_bytes_per_s": 1e9, "distance_m": metres} for metres in (20.0, 300.0)
)
TRACE = """time_s,device,down_bits_per_s,up_bits_per_s
0,jetson-0,1e6,1e6
0,jetson-1,1e6,1e6
2,jetson-0,2e6,1e6
2,jetson-1,2e6,1e6
4,jetson-0,4e6,1e6
4,jetson-1,4e6,1e6
"""


def config_of(*devices: dict[str, Any], **sections: Any) -> RunConfig:
    named = [{"name": f"jetson-{n}", **device} for n, device in enumerate(devices or (NEAR, FAR))]
    content = {"name": "small", "device": named, "policy": [{"name": "topk"}], "radio": {}, **sections}
    return RunConfig.model_validate(content)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    spec = FfnSpec(width=8, inner=12)
    return write_split(tmp_path / "split", spec, devices=("jetson-0", "jetson-1"), layers=1, experts=2)[0]


@pytest.mark.parametrize("medium", ["fdd", "tdd", "shared"])
@pytest.mark.parametrize("compute", ["paper", "roofline"])
def test_a_draw_is_the_prompt_of_that_number_told_as_known_latencies(
    manifest: Manifest, medium: str, compute: str
) -> None:
    throttle = {"device": "jetson-1", "from_prompt": 1, "until_prompt": 2, "factor": 3.0}
    config = config_of(
        radio={"medium": medium, "delay_s": 0.002}, emulation={"compute": compute}, throttle=[throttle], seed=5
    )
    draws = draw_channel(config, manifest, 4, prompts=2)
    channel = make_channel(config)
    assert channel is not None
    models = [compute_model(config, manifest, device) for device in config.devices]
    known = KnownLatencies(2, *(8.0 * size for size in row_bytes(config, manifest)))
    for draw in range(4):
        links = channel.links(draw, 0.0)
        known.tell(*links, 0.002, models, np.array([1.0, 3.0 if draw % 2 else 1.0]), 0.0)
        told, state = known.state(0, np.ones(2, bool), 0.0), draws.state(draw)
        for name in ("token_s_N", "base_s_N", "expert_s_N", "row_s_N"):
            np.testing.assert_allclose(getattr(state, name), getattr(told, name), rtol=1e-12)
        np.testing.assert_allclose(draws.air_row_s_DWN[draw], known.air_row_s_WN(), rtol=1e-12)
        assert state.available_N.all()


def test_the_air_that_a_policy_sees_gives_the_rates_at_the_even_split(manifest: Manifest) -> None:
    draws = draw_channel(config_of(), manifest, 3, prompts=1)
    air = draws.state(1).air
    assert air is not None
    even_hz = air.bandwidth_hz / 2
    bits_WN = air.row_s_WN * even_hz * np.log2(1 + air.snr_hz_WN / even_hz)
    np.testing.assert_allclose(bits_WN, np.broadcast_to(draws.row_bits_W[:, None], (2, 2)))
    even_DBN = draws.air_row_s_DBN(np.full((3, 1, 2), 0.5))
    np.testing.assert_allclose(even_DBN, draws.air_row_s_DBN(None))
    assert np.isinf(draws.air_row_s_DBN(np.array([[[0.0, 1.0]]] * 3))[:, 0, 0]).all()


@pytest.mark.parametrize("radio", [{"medium": "shared"}])
def test_where_the_airtime_is_shared_there_is_no_band_to_split(manifest: Manifest, radio: dict[str, Any]) -> None:
    assert draw_channel(config_of(radio=radio), manifest, 1, prompts=1).state(0).air is None


def test_a_trace_is_read_from_its_start_to_its_end(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    config = config_of(radio={"trace": str(tmp_path / "trace.csv")})
    draws = draw_channel(config, manifest, 4, prompts=1)
    np.testing.assert_allclose(draws.row_bits_W[0] / draws.air_row_s_DWN[:, 0, 0], [1e6, 1e6, 2e6, 2e6])
    assert draws.state(0).air is None


def test_placements_have_seeds_of_their_own_and_the_first_is_the_run_files(manifest: Manifest) -> None:
    config = config_of(radio={"placement": {"seed": 3}, "fading": "none"}, seed=8)
    first, second = draw_placements(config, manifest, 2, 2, prompts=1)
    np.testing.assert_array_equal(first.token_s_DN, draw_channel(config, manifest, 2, prompts=1).token_s_DN)
    assert not np.allclose(first.token_s_DN, second.token_s_DN)
    other = config_of(radio={"placement": {"seed": 4}, "fading": "none"}, seed=9)
    np.testing.assert_array_equal(second.token_s_DN, draw_channel(other, manifest, 2, prompts=1).token_s_DN)


def test_a_mean_draw_lies_within_what_is_drawn(manifest: Manifest) -> None:
    draws = draw_channel(config_of(), manifest, 50, prompts=1)
    mean = draws.mean()
    assert len(mean) == 1
    assert (mean.token_s_DN >= draws.token_s_DN.min(axis=0)).all()
    assert (mean.token_s_DN <= draws.token_s_DN.max(axis=0)).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_of(radio=None), r"no \[radio\]"),
        (config_of(NEAR, {"distance_m": 5.0}), r"device\[1\] \(jetson-1\) needs emulated_flops_per_s"),
        (config_of(steering={"target_ms": 20.0}), r"--set steering=\{\}"),
    ],
)
def test_what_is_not_described_cannot_be_simulated(manifest: Manifest, config: RunConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        draw_placements(config, manifest, 1, 1, prompts=1)


def test_given_distances_cannot_be_placed_again(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="--placements"):
        draw_placements(config_of(), manifest, 1, 2, prompts=1)
