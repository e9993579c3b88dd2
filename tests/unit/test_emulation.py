"""What surrounds an emulated run, without links: channel, compute models, pace of the nodes, what is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from splits import write_split

from jetson_node.pacing import Pacing
from testbed.channel.radio import Channel, Links, RadioChannel, placements
from testbed.channel.trace import TraceChannel
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest
from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.experiment.emulation import NOTHING, Emulation, compute_model, make_channel, make_csi, row_bytes
from testbed.latency.csi import EstimatedCsi, ReportedCsi
from testbed.latency.model import ComputeModel, expert_flop_per_row, rate_bits_per_s, token_s
from testbed.runlog.schema import GenerationPhase
from testbed.wire.quantization import SCHEMES

SPEC = FfnSpec(width=8, inner=12)
FLOP_PER_ROW = expert_flop_per_row(8, 12)
SLOW = {"emulated_flops_per_s": FLOP_PER_ROW / 0.25}  # a row takes 0.25 s
SLOWER = {"emulated_flops_per_s": FLOP_PER_ROW / 0.5}
PLACED = {"placement": {"seed": 1}}
TWO_SLOW = (SLOW, SLOWER)
TRACE = """time_s,device,down_bits_per_s,up_bits_per_s
0,jetson-0,1e6,1e6
0,jetson-1,1e6,1e6
2,jetson-0,2e6,1e6
2,jetson-1,2e6,1e6
4,jetson-0,4e6,1e6
4,jetson-1,4e6,1e6
"""


class Clock:
    """Real time, which passes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("testbed.experiment.emulation.monotonic", clock)
    return clock


def config_of(*devices: dict[str, Any], **sections: Any) -> RunConfig:
    """Devices jetson-0, jetson-1, ...; two of this machine's own speed if nothing is said of them."""
    named = [{"name": f"jetson-{n}", **device} for n, device in enumerate(devices or ({}, {}))]
    return RunConfig.model_validate({"name": "small", "device": named, "policy": [{"name": "topk"}], **sections})


def manifest_of(folder: Path, spec: FfnSpec = SPEC) -> Manifest:
    return write_split(folder / "split", spec, devices=("jetson-0", "jetson-1"), layers=1, experts=2)[0]


@contextmanager
def emulating(folder: Path, config: RunConfig) -> Iterator[tuple[Emulation, list[dict[str, Any]]]]:
    """The emulation, and what it tells of the channel."""
    told: list[dict[str, Any]] = []

    def on_event(kind: str, **facts: Any) -> None:
        told.append({"kind": kind, **facts})

    with Emulation(config, manifest_of(folder), folder, folder, on_event) as emulation:
        yield emulation, told


def paces(emulation: Emulation) -> list[float]:
    """The factor that each node reads."""
    one_second = ComputeModel(0.0, 0.0, 1.0)
    return [Pacing(one_second, file).seconds(1, 1) for file in emulation.pace_files.values()]


def throttle(device: int, factor: float, from_prompt: int = 0, until_prompt: int = 9) -> dict[str, Any]:
    return {
        "device": f"jetson-{device}", "factor": factor, "from_prompt": from_prompt, "until_prompt": until_prompt,
    }  # fmt: skip


# --- The channel ---


def rates(channel: Channel | None, prompt: int = 0) -> list[list[float]]:
    assert channel is not None
    return [rate_N.tolist() for rate_N in channel.links(prompt, 0.0)]


def test_without_a_radio_there_is_no_channel() -> None:
    assert make_channel(config_of()) is None


def test_devices_stand_where_the_run_file_puts_them() -> None:
    config = config_of({"distance_m": 10.0}, {"distance_m": 90.0}, radio={"fading": "none"}, seed=3)
    assert config.radio is not None
    assert rates(make_channel(config)) == rates(RadioChannel(config.radio, np.array([10.0, 90.0]), 3))
    down_N, up_N = rates(make_channel(config))
    assert down_N[0] > down_N[1]
    assert up_N[0] > up_N[1]


def test_devices_stand_where_the_placements_seed_puts_them() -> None:
    config = config_of(radio=PLACED)
    assert config.radio is not None
    assert config.radio.placement is not None
    distance_m_N = placements(config.radio.placement, 2)
    assert rates(make_channel(config)) == rates(RadioChannel(config.radio, distance_m_N, config.seed))
    assert rates(make_channel(config)) != rates(make_channel(config_of(radio={"placement": {"seed": 2}})))


def test_the_runs_seed_decides_the_fading_of_every_prompt() -> None:
    same, again, other = (make_channel(config_of(radio=PLACED, seed=seed)) for seed in (1, 1, 2))
    for prompt in range(3):
        assert rates(same, prompt) == rates(again, prompt) != rates(other, prompt)
    assert rates(same, 0) != rates(same, 1)


def test_a_trace_stands_for_the_whole_channel(tmp_path: Path) -> None:
    (tmp_path / "rates.csv").write_text(TRACE)
    channel = make_channel(config_of(radio={"trace": str(tmp_path / "rates.csv")}))
    assert isinstance(channel, TraceChannel)
    assert channel.end_s == 4.0
    with pytest.raises(ConfigError, match="no such file"):
        make_channel(config_of(radio={"trace": str(tmp_path / "gone.csv")}))


# --- What a row costs ---


def test_rows_weigh_what_their_schemes_make_of_them(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    assert row_bytes(config_of(wire={"down": "fp32", "up": "fp16"}), manifest) == (32, 16)
    assert row_bytes(config_of(wire={"down": "int8", "up": "bf16"}), manifest) == (SCHEMES["int8"].row_bytes(8), 16)


def test_rows_are_filled_up_and_never_cut(tmp_path: Path) -> None:
    manifest, wire = manifest_of(tmp_path), {"down": "fp16", "up": "fp32"}
    assert row_bytes(config_of(wire=wire, emulation={"as_if_width": 100}), manifest) == (200, 400)
    assert row_bytes(config_of(wire=wire, emulation={"as_if_width": 4}), manifest) == (16, 32)


@pytest.mark.parametrize("compute", ["paper", "roofline"])
def test_a_device_that_plays_no_other_is_as_fast_as_it_is(tmp_path: Path, compute: str) -> None:
    config = config_of({"emulated_base_s": 1.0, "emulated_memory_bytes_per_s": 1e9}, emulation={"compute": compute})
    assert compute_model(config, manifest_of(tmp_path), config.devices[0]) == NOTHING
    assert NOTHING.seconds(1000, 8) == 0


def test_in_the_paper_every_row_costs_its_flop_and_nothing_else_costs(tmp_path: Path) -> None:
    config = config_of({**SLOW, "emulated_memory_bytes_per_s": 1.0, "emulated_base_s": 9.0}, SLOWER)
    models = [compute_model(config, manifest_of(tmp_path), device) for device in config.devices]
    assert models == [ComputeModel(0.0, 0.0, 0.25), ComputeModel(0.0, 0.0, 0.5)]


@pytest.mark.parametrize(("has_gate", "matrices"), [(True, 3), (False, 2)])
def test_on_a_roofline_each_touched_expert_is_read_once(tmp_path: Path, has_gate: bool, matrices: int) -> None:
    spec = FfnSpec(width=8, inner=12, has_gate=has_gate)
    device = {"emulated_flops_per_s": 1000.0, "emulated_memory_bytes_per_s": 100.0, "emulated_base_s": 0.5}
    config = config_of(device, emulation={"compute": "roofline", "weight_bytes_per_value": 1.5})
    found = compute_model(config, manifest_of(tmp_path, spec), config.devices[0])
    expert_s = matrices * 8 * 12 * 1.5 / 100
    assert found == ComputeModel(0.5, expert_s, expert_flop_per_row(8, 12, has_gate) / 1000)


@pytest.mark.parametrize("sizes", [{"as_if_width": 4096, "as_if_inner": 14336}, {"as_if_width": 4096}])
def test_compute_costs_what_the_model_that_is_played_would(tmp_path: Path, sizes: dict[str, int]) -> None:
    device = {"emulated_flops_per_s": 1e12, "emulated_memory_bytes_per_s": 1e9}
    inner = sizes.get("as_if_inner", SPEC.inner)
    for compute, expert_s in (("paper", 0.0), ("roofline", 3 * 4096 * inner * 2 / 1e9)):
        config = config_of(device, emulation={"compute": compute, **sizes})
        found = compute_model(config, manifest_of(tmp_path), config.devices[0])
        assert found == ComputeModel(0.0, expert_s, expert_flop_per_row(4096, inner) / 1e12)


# --- Prompts ---


def test_nodes_keep_their_pace_until_the_first_prompt(tmp_path: Path) -> None:
    with emulating(tmp_path, config_of(*TWO_SLOW)) as (emulation, _):
        assert paces(emulation) == [1.0, 1.0]


def test_a_node_goes_at_the_pace_of_its_throttles_stretched_by_the_dilation(tmp_path: Path) -> None:
    throttles = [throttle(1, 10.0, 1, 3), throttle(1, 2.0, 2, 4), throttle(0, 3.0, 4, 5)]
    config = config_of(*TWO_SLOW, throttle=throttles, emulation={"dilation": 5.0, "decode_dilation": 8.0})
    with emulating(tmp_path, config) as (emulation, _):
        found = []
        for prompt in range(5):
            assert emulation.begin_prompt(0, prompt) == 5.0
            found.append(paces(emulation))
        assert found == [[5, 5], [5, 50], [5, 100], [5, 10], [15, 5]]
        assert emulation.begin_prompt(0, 2) == 5.0
        assert emulation.enter(GenerationPhase.DECODE) == 8.0
        assert paces(emulation) == [8, 160]
        assert emulation.enter(GenerationPhase.PREFILL) == 5.0
        assert paces(emulation) == [5, 100]


def test_where_nothing_is_emulated_time_is_not_stretched(tmp_path: Path) -> None:
    with emulating(tmp_path, config_of(throttle=[throttle(0, 4.0)])) as (emulation, told):
        assert not emulation.emulates
        assert emulation.begin_prompt(0, 0) == 1.0
        assert emulation.enter(GenerationPhase.DECODE) == 1.0
        assert paces(emulation) == [4.0, 1.0]
        assert told == []


@pytest.mark.parametrize("config", [config_of(radio=PLACED), config_of(SLOW, {})])
def test_a_channel_or_one_slow_device_is_enough_to_stretch_time(tmp_path: Path, config: RunConfig) -> None:
    with emulating(tmp_path, config) as (emulation, _):
        assert emulation.emulates
        assert emulation.begin_prompt(0, 0) == config.emulation.dilation
        assert emulation.enter(GenerationPhase.DECODE) == config.emulation.decode_dilation
        assert emulation.begin_prompt(0, 1) == config.emulation.dilation


def test_every_prompts_channel_is_told_as_it_is_without_dilation(tmp_path: Path) -> None:
    config = config_of(*TWO_SLOW, radio=PLACED, throttle=[throttle(0, 2.0, 1, 2)], emulation={"dilation": 7.0})
    with emulating(tmp_path, config) as (emulation, told):
        for policy, prompt in ((0, 0), (0, 1), (1, 0), (1, 1)):
            emulation.begin_prompt(policy, prompt)
    assert [(event["kind"], event["policy"], event["prompt"]) for event in told] == [
        ("channel", 0, 0), ("channel", 0, 1), ("channel", 1, 0), ("channel", 1, 1),
    ]  # fmt: skip
    assert [event["factor"] for event in told] == [[1, 1], [2, 1]] * 2
    channel = make_channel(config)
    for event in told:
        assert [event["down_bits_per_s"], event["up_bits_per_s"]] == rates(channel, event["prompt"])


# --- What a run with known latencies is told ---


def eq6_s(config: RunConfig, links: Links, factor_N: list[float]) -> list[float]:
    """Eq. 6 of both devices of TWO_SLOW, rows of 8 values as int8 with their scale."""
    bits = 8 * SCHEMES["int8"].row_bytes(8)
    delay_s = config.radio.delay_s if config.radio is not None else 0.0
    found: list[float] = (2 * delay_s + token_s(bits, bits, *links, np.multiply([0.25, 0.5], factor_N))).tolist()
    return found


@pytest.mark.parametrize(("estimates", "follows"), [("oracle", True), ("static", False)])
def test_an_oracle_knows_every_prompt_and_a_static_estimate_the_first_only(
    tmp_path: Path, clock: Clock, estimates: str, follows: bool
) -> None:
    radio = {**PLACED, "delay_s": 0.125}
    config = config_of(*TWO_SLOW, radio=radio, throttle=[throttle(1, 10.0, 1, 2)], estimator={"estimates": estimates})
    channel = make_channel(config)
    assert channel is not None
    with emulating(tmp_path, config) as (emulation, told):
        assert np.isnan(emulation.known.token_s_N).all()
        for policy, prompt in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            clock.now_s += 10
            emulation.begin_prompt(policy, prompt)
            truth_s = eq6_s(config, channel.links(prompt, 0.0), [1.0, 10.0 if prompt == 1 else 1.0])
            first_s = eq6_s(config, channel.links(0, 0.0), [1.0, 1.0])
            assert emulation.known.token_s_N.tolist() == pytest.approx(truth_s if follows else first_s)
            assert told[-1]["token_s"] == pytest.approx(truth_s)  # the log has the truth either way
            age_s_N = emulation.known.state(0, np.ones(2, bool), clock.now_s + 1).age_s_N
            assert age_s_N.tolist() == ([1, 1] if follows else [10 * len(told) - 9] * 2)


# --- A trace goes on with emulated time ---


def traced(folder: Path, **emulation: float) -> RunConfig:
    (folder / "rates.csv").write_text(TRACE)
    return config_of(radio={"trace": str(folder / "rates.csv")}, emulation=emulation)


def down_megabits(told: list[dict[str, Any]]) -> list[float]:
    return [event["down_bits_per_s"][0] / 1e6 for event in told]


def test_a_trace_goes_on_with_emulated_time(tmp_path: Path, clock: Clock) -> None:
    with emulating(tmp_path, traced(tmp_path, dilation=4.0, decode_dilation=10.0)) as (emulation, told):
        emulation.begin_prompt(0, 0)
        clock.now_s += 4 * 1.5
        emulation.begin_prompt(0, 1)  # at 1.5 s
        clock.now_s += 4 * 0.5
        emulation.begin_prompt(0, 2)  # at 2 s
        clock.now_s += 4 * 0.4
        emulation.enter(GenerationPhase.DECODE)
        clock.now_s += 10 * 1.5
        emulation.begin_prompt(0, 3)  # at 3.9 s: the prompt before was continued
        clock.now_s += 4 * 0.2
        emulation.begin_prompt(0, 4)
    assert down_megabits(told) == [1, 1, 2, 2, 4]


def test_the_first_prompt_begins_with_the_trace_whenever_that_is(tmp_path: Path, clock: Clock) -> None:
    with emulating(tmp_path, traced(tmp_path, dilation=1.0)) as (emulation, told):
        clock.now_s += 100
        emulation.begin_prompt(0, 0)  # when the nodes have joined
        clock.now_s += 100
        emulation.begin_prompt(0, 0)  # when the first policy begins
        clock.now_s += 3
        emulation.begin_prompt(0, 1)
    assert down_megabits(told) == [1, 1, 2]


def test_all_policies_meet_a_trace_as_the_first_one_did(tmp_path: Path, clock: Clock) -> None:
    with emulating(tmp_path, traced(tmp_path, dilation=2.0)) as (emulation, told):
        for policy, real_s in enumerate((4.2, 0.1, 1000.0)):
            for prompt in range(3):
                emulation.begin_prompt(policy, prompt)
                clock.now_s += real_s
    assert down_megabits(told) == [1, 2, 4] * 3


def test_without_links_every_node_connects_to_the_base_station_itself(tmp_path: Path) -> None:
    with emulating(tmp_path, config_of(*TWO_SLOW)) as (emulation, _):
        assert emulation.listen_host() == "127.0.0.1"
        assert emulation.start_relay("127.0.0.1", 5555) == {"jetson-0": 5555, "jetson-1": 5555}


# --- The band is shared out ---


class KeptLinks:
    """Stand for the links: keep what they are set to."""

    def __init__(self) -> None:
        self.set: list[tuple[int, list[float], list[float], float]] = []

    def set_links(self, prompt: int, down: list[float], up: list[float], delay_s: float) -> None:
        self.set.append((prompt, down, up, delay_s))


FADING = {"distance_m": 100.0, **SLOW}, {"distance_m": 300.0, **SLOW}


@pytest.mark.parametrize("phase", GenerationPhase)
def test_links_take_the_rates_that_the_prompts_channel_has_under_the_shares(
    tmp_path: Path, phase: GenerationPhase
) -> None:
    config = config_of(*FADING, radio={"delay_s": 0.25}, emulation={"dilation": 4.0, "decode_dilation": 8.0})
    channel, share_N, links = make_channel(config), np.array([0.75, 0.25]), KeptLinks()
    assert isinstance(channel, RadioChannel)
    with emulating(tmp_path, config) as (emulation, told):
        emulation._links = links  # type: ignore[assignment]
        for prompt in (0, 1):
            emulation.begin_prompt(0, prompt)
            dilation = emulation.enter(phase)
            before = len(told)
            emulation.share_band(share_N)
            down_N, up_N = channel.shared_links(prompt, share_N)
            assert links.set[-1] == (prompt, (down_N / dilation).tolist(), (up_N / dilation).tolist(), 0.25 * dilation)
            emulation.share_band(np.array([0.5, 0.5]))
            assert links.set[-1] == links.set[-3], "the even split is how a prompt begins"
            assert len(told) == before, "the channel itself is as it was"


def test_links_keep_their_shares_when_a_prompt_goes_over_to_decoding(tmp_path: Path) -> None:
    config = config_of(*FADING, radio={"delay_s": 0.25}, emulation={"dilation": 4.0, "decode_dilation": 8.0})
    with emulating(tmp_path, config) as (emulation, told):
        emulation._links = links = KeptLinks()  # type: ignore[assignment]
        emulation.begin_prompt(0, 0)
        emulation.share_band(np.array([0.75, 0.25]))
        emulation.enter(GenerationPhase.DECODE)
        (prompt, *before), (same_prompt, *after) = links.set[-2:]
        assert prompt == same_prompt == 0
        assert [np.divide(rates, 2).tolist() for rates in before[:2]] == after[:2]
        assert (before[2], after[2]) == (1.0, 2.0)
        assert len(told) == 1, "the channel itself is as it was"


def test_a_trace_knows_no_band_to_share_out(tmp_path: Path) -> None:
    with emulating(tmp_path, traced(tmp_path)) as (emulation, _):
        emulation._links = links = KeptLinks()  # type: ignore[assignment]
        emulation.begin_prompt(0, 0)
        emulation.share_band(np.array([0.75, 0.25]))
        assert len(links.set) == 1
        assert emulation.csi is None


def test_the_links_state_is_measured_unless_devices_report_it(tmp_path: Path) -> None:
    estimated = make_csi(config_of(radio=PLACED), (100, 100))
    reported = make_csi(config_of(radio=PLACED, csi={"source": "reported"}), (100, 100))
    assert isinstance(estimated, EstimatedCsi)
    assert isinstance(reported, ReportedCsi)
    assert make_csi(config_of(), (100, 100)) is None
    assert make_csi(config_of(radio={**PLACED, "medium": "shared"}), (100, 100)) is None


def test_a_measured_row_is_one_of_the_wires_bits(tmp_path: Path) -> None:
    config = config_of(*FADING, wire={"down": "fp32", "up": "fp16"})
    config = config.model_copy(update={"radio": config_of(*FADING, radio={}).radio})
    with emulating(tmp_path, config) as (emulation, _):
        assert emulation.csi is not None
        row_s_WN = np.array([[1e-6, 2e-6], [3e-6, 4e-6]])
        air = emulation.csi.air(row_s_WN)
        bits_W1 = np.array([[8 * 32], [8 * 16]])
        even_WN = rate_bits_per_s(50e6, air.snr_hz_WN, 1.0, 1.0)
        np.testing.assert_allclose(even_WN, bits_W1 / row_s_WN)


@pytest.mark.parametrize("error_db", [0.0, 3.0])
def test_devices_report_every_prompts_own_links_with_the_error_asked_for(tmp_path: Path, error_db: float) -> None:
    config = config_of(*FADING, radio={}, csi={"source": "reported", "error_db": error_db})
    channel = make_channel(config)
    assert isinstance(channel, RadioChannel)
    with emulating(tmp_path, config) as (emulation, _):
        assert emulation.csi is not None
        seen = []
        for policy, prompt in ((0, 0), (0, 1), (1, 0)):
            emulation.begin_prompt(policy, prompt)
            seen.append(emulation.csi.air(np.ones((2, 2))).snr_hz_WN)
            np.testing.assert_array_equal(seen[-1], channel.reported_snr_hz(prompt, error_db))
        np.testing.assert_array_equal(seen[0], seen[2], "every policy is told the same")
        assert (seen[0] != seen[1]).all()
