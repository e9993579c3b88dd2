"""Channel draws as arrays: what every device costs in every draw, by Eq. 6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from testbed.channel.radio import RadioChannel, link_bandwidth_hz
from testbed.channel.trace import TraceChannel
from testbed.checkpoint.manifest import Manifest
from testbed.config import RadioSection, RunConfig
from testbed.errors import ConfigError
from testbed.experiment.emulation import compute_model, make_channel, row_bytes
from testbed.latency.model import ComputeModel, noise_w_per_hz, rate_bits_per_s
from testbed.policies.base import Air, FloatArray, State
from testbed.simulation.kernels import Floats


@dataclass(frozen=True, slots=True)
class Draws:
    """D draws of one placement's channel for N devices; W: down, up. Seconds at the even split of the band.

    A device's time of a block is base + max(rows * compute_row, experts touched * expert) + rows * air of both ways.
    """

    token_s_DN: Floats  # one row alone (Eq. 6)
    base_s_DN: Floats  # delay of both ways included
    expert_s_DN: Floats
    compute_row_s_DN: Floats
    air_row_s_DWN: Floats
    snr_hz_DWN: Floats  # P g^2 / N0; NaN where only rates are known
    row_bits_W: Floats
    bandwidth_hz: float  # in total; NaN where there is no band to share out
    shared: bool  # all links take turns on one air

    def __len__(self) -> int:
        return len(self.token_s_DN)

    @property
    def devices(self) -> int:
        return int(self.token_s_DN.shape[1])

    def part(self, first: int, end: int) -> Draws:
        """Draws `first` to `end` - 1."""
        return replace(self, **{name: values[first:end] for name, values in self._per_draw()})

    def _per_draw(self) -> Iterator[tuple[str, Any]]:
        """The arrays of which a draw has its own row: their names say so."""
        return ((field.name, getattr(self, field.name)) for field in fields(self) if "_D" in field.name)

    def air_row_s_DBN(self, share_DBN: FloatArray | None) -> Floats:
        """A row's seconds on the air, both ways, at these shares of the band; None: even ones, with B = 1."""
        if share_DBN is None:
            even_DBN: Floats = self.air_row_s_DWN.sum(axis=1)[:, None]
            return even_DBN
        band_hz_D1BN = share_DBN[:, None] * self.bandwidth_hz
        rate_DWBN = rate_bits_per_s(band_hz_D1BN, self.snr_hz_DWN[:, :, None], 1.0, 1.0)
        with np.errstate(divide="ignore"):
            air_DBN: Floats = (self.row_bits_W[:, None, None] / rate_DWBN).sum(axis=1)
        return air_DBN

    def mean(self) -> Draws:
        """One draw with the mean SNR and the mean devices. Only where there is a band to share out."""
        mean = {name: values.mean(axis=0, keepdims=True) for name, values in self._per_draw()}
        even_hz = self.bandwidth_hz / self.devices
        air_row_s_DWN = self.row_bits_W[:, None] / rate_bits_per_s(even_hz, mean["snr_hz_DWN"], 1.0, 1.0)
        work_s_DN = np.maximum(mean["expert_s_DN"], mean["compute_row_s_DN"])
        token_s_DN = mean["base_s_DN"] + work_s_DN + air_row_s_DWN.sum(axis=1)
        return replace(self, **{**mean, "air_row_s_DWN": air_row_s_DWN, "token_s_DN": token_s_DN})

    def state(self, draw: int) -> State:
        """What a policy is told: this draw's truth, as under `estimates = "oracle"`."""
        air_row_s_WN = self.air_row_s_DWN[draw]
        air = Air(self.bandwidth_hz, self.snr_hz_DWN[draw], air_row_s_WN) if self.bandwidth_hz > 0 else None
        return State(
            self.token_s_DN[draw],
            np.ones(self.devices, bool),
            np.zeros(self.devices),
            self.base_s_DN[draw],
            self.expert_s_DN[draw],
            self.compute_row_s_DN[draw] + air_row_s_WN.sum(axis=0),
            air,
        )


def check_simulable(config: RunConfig) -> None:
    """Raises ConfigError unless the run file says how long everything takes."""
    if config.radio is None:
        raise ConfigError("simulate: the run file has no [radio], and links that are not described take unknown times")
    for i, device in enumerate(config.devices):
        if device.emulated_flops_per_s is None:
            raise ConfigError(f"simulate: device[{i}] ({device.name}) needs emulated_flops_per_s: its speed is unknown")
    if config.steering.wanted:
        raise ConfigError("simulate: [steering] goes by what rounds take, and none are run: --set steering={}")


def draw_placements(config: RunConfig, manifest: Manifest, draws: int, placements: int, prompts: int) -> list[Draws]:
    """`draws` of every placement's channel. Placement i has the run file's seeds plus i; draw d is its prompt d.

    A throttle of the run file holds in draw d if it does in prompt d modulo `prompts`, the workload's.
    Raises ConfigError where several placements are asked for and the run file does not draw them.
    """
    check_simulable(config)
    if placements > 1 and (config.radio is None or config.radio.placement is None):
        raise ConfigError("--placements: the run file gives distances; add [radio.placement] to draw them from seeds")
    return [draw_channel(_with_seeds(config, i), manifest, draws, prompts) for i in range(placements)]


def _with_seeds(config: RunConfig, more: int) -> RunConfig:
    if config.radio is None or config.radio.placement is None:
        return config
    placement = config.radio.placement.model_copy(update={"seed": config.radio.placement.seed + more})
    radio = config.radio.model_copy(update={"placement": placement})
    return config.model_copy(update={"radio": radio, "seed": config.seed + more})


def draw_channel(config: RunConfig, manifest: Manifest, draws: int, prompts: int) -> Draws:
    """Draws 0 to `draws` - 1 of the run file's channel and devices."""
    check_simulable(config)
    radio = config.radio or RadioSection()
    rates_DWN, snr_hz_DWN = _rates(config, radio, draws)
    compute_N = [compute_model(config, manifest, device) for device in config.devices]
    return cost_draws(
        rates_DWN,
        snr_hz_DWN,
        compute_N,
        _factors(config, draws, prompts),
        row_bits_W=8.0 * np.array(row_bytes(config, manifest)),
        delay_s=radio.delay_s,
        bandwidth_hz=np.nan if radio.medium == "shared" or radio.trace is not None else radio.bandwidth_hz,
        shared=radio.medium == "shared",
    )


def cost_draws(
    rates_DWN: FloatArray,
    snr_hz_DWN: Floats,
    compute_N: Sequence[ComputeModel],
    factor_DN: FloatArray,
    *,
    row_bits_W: Floats,
    delay_s: float = 0.0,
    bandwidth_hz: float = np.nan,
    shared: bool = False,
) -> Draws:
    """What rates [bit/s] and devices, each `factor` times slower than its model, make of a row and of a block."""
    base_s_N, expert_s_N, row_s_N = (
        np.array([getattr(model, name) for model in compute_N]) for name in ("base_s", "expert_s", "row_s")
    )
    air_row_s_DWN = row_bits_W[:, None] / rates_DWN
    base_s_DN = factor_DN * base_s_N + 2 * delay_s
    token_s_DN = base_s_DN + factor_DN * np.maximum(expert_s_N, row_s_N) + air_row_s_DWN.sum(axis=1)
    return Draws(
        token_s_DN, base_s_DN, factor_DN * expert_s_N, factor_DN * row_s_N,
        air_row_s_DWN, snr_hz_DWN, row_bits_W, bandwidth_hz, shared,
    )  # fmt: skip


def _rates(config: RunConfig, radio: RadioSection, draws: int) -> tuple[Floats, Floats]:
    """rates_DWN in bit/s at the even split, and snr_hz_DWN. A trace is read at even steps from its start to its end."""
    channel = make_channel(config)
    if isinstance(channel, RadioChannel):
        gain_DWN = np.array([channel.gains(draw) for draw in range(draws)])
        power_w_W1 = np.array([[radio.station_power_w], [radio.device_power_w]])
        noise = noise_w_per_hz(radio.noise_figure_db)
        band_hz = link_bandwidth_hz(radio, len(config.devices))
        snr_hz_DWN: Floats = power_w_W1 * gain_DWN**2 / noise
        return np.asarray(rate_bits_per_s(band_hz, power_w_W1, gain_DWN, noise), float), snr_hz_DWN
    if not isinstance(channel, TraceChannel):
        raise ConfigError("simulate: the run file has no [radio]")
    rates_DWN = np.array([channel.links(draw, channel.end_s * draw / draws) for draw in range(draws)])
    return rates_DWN, np.full_like(rates_DWN, np.nan)


def _factors(config: RunConfig, draws: int, prompts: int) -> Floats:
    """How much slower than its model every device is."""
    place = {device.name: n for n, device in enumerate(config.devices)}
    factor_DN = np.ones((draws, len(place)))
    for throttle in config.throttles:
        factor_P = np.array([throttle.factor_at(prompt) for prompt in range(prompts)])
        factor_DN[:, place[throttle.device]] *= np.resize(factor_P, draws)
    return factor_DN
