"""The true radio channel: path loss, shadowing, blockage and fading, drawn per prompt from one seed.

Everything is a function of (seed, prompt), so that every policy of a comparison meets the same draws. Base station,
estimator and policies never see this.

The amplitude gain of a link is 10^(-PL/20) times shadowing, blockage and fading. Fading has mean amplitude 1, so with
Rayleigh the mean is the paper's 10^(-PL/20). Shadowing (a Gaussian in dB with mean 0) and blockage are the
surroundings': the same for both directions. Fading is the same for both under `tdd` and `shared`, where both use one
frequency and the channel is reciprocal; under `fdd` the directions' bands lie apart and fade independently.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.config.radio import LEAST_M, MOST_M, BlockageSection, PlacementSection, RadioSection
from testbed.errors import ConfigError
from testbed.latency.model import amplitude_gain, noise_w_per_hz, path_loss_db, rate_bits_per_s
from testbed.policies.base import BoolArray, FloatArray

LEAST_BITS_PER_S, MOST_BITS_PER_S = 1e3, 1e12  # a link outside is a mistake in the run file


class Links(NamedTuple):
    """The rate of every device's link while it is on the air."""

    down_bits_per_s_N: FloatArray
    up_bits_per_s_N: FloatArray


class Gains(NamedTuple):
    """The amplitude gain of every device's link, path loss included."""

    down_N: FloatArray
    up_N: FloatArray


class Channel(Protocol):
    """Where rates come from. A radio ignores the time, a trace the prompt."""

    def links(self, prompt: int, time_s: float) -> Links: ...


class Effect(IntEnum):
    """Each has a random stream per device. A new one comes last: the numbers are part of every seed's meaning."""

    PLACEMENT = 0
    SHADOWING = 1
    BLOCKAGE = 2
    FADING_DOWN = 3
    FADING_UP = 4
    REPORT = 5


def placements(section: PlacementSection, devices: int, seed: int | None = None) -> FloatArray:
    """Distances in m (N) drawn from `seed`, or the section's own. One more device moves none of the others."""
    streams = _streams(section.seed if seed is None else seed, Effect.PLACEMENT, devices)
    return np.array([stream.uniform(section.min_m, section.max_m) for stream in streams])


def link_bandwidth_hz(section: RadioSection, devices: int) -> float:
    """The band that one link has while it is on the air."""
    return section.bandwidth_hz if section.medium == "shared" else section.bandwidth_hz / devices


class RadioChannel:
    """Rates of N devices per prompt. Raises ConfigError where a distance or a mean rate is impossible."""

    def __init__(self, section: RadioSection, distance_m_N: FloatArray, seed: int) -> None:
        distance_m_N = np.asarray(distance_m_N, float)
        _check_distances(distance_m_N)
        devices = len(distance_m_N)
        self._section, self._seed = section, seed
        self._mean_gain_N = amplitude_gain(path_loss_db(distance_m_N, section.carrier_ghz))
        _check_rates(self.mean_links(), distance_m_N)
        shadow_db_N = section.shadowing_db * _normals(_streams(seed, Effect.SHADOWING, devices))
        self._shadowed_gain_N = self._mean_gain_N * amplitude_gain(shadow_db_N)
        self._blockage = _Blockage(section.blockage, _streams(seed, Effect.BLOCKAGE, devices))
        self._fading_down = _Fading(section, _streams(seed, Effect.FADING_DOWN, devices))
        reciprocal = section.medium != "fdd"
        self._fading_up = None if reciprocal else _Fading(section, _streams(seed, Effect.FADING_UP, devices))
        self._drawn: list[Gains] = []

    def links(self, prompt: int, time_s: float = 0.0) -> Links:  # noqa: ARG002 (a Channel is asked with both)
        """The rates during `prompt` (from 0 on), constant for its whole length: block fading."""
        return self._rates(self.gains(prompt))

    def shared_links(self, prompt: int, share_N: FloatArray) -> Links:
        """The rates during `prompt` where device n has share_N[n] of the band (`fdd`, `tdd`)."""
        return self._rates(self.gains(prompt), share_N * self._section.bandwidth_hz)

    def reported_snr_hz(self, prompt: int, error_db: float) -> FloatArray:
        """snr_hz_WN = P g^2 / N0 of down and up as devices would report it, off by `error_db` (standard deviation)."""
        section, gains, noise = self._section, self.gains(prompt), noise_w_per_hz(self._section.noise_figure_db)
        powers_w = section.station_power_w, section.device_power_w
        snr_hz_WN = np.stack([power_w * gain_N**2 / noise for power_w, gain_N in zip(powers_w, gains, strict=True)])
        streams = [
            np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(n, Effect.REPORT, prompt)))
            for n in range(snr_hz_WN.shape[1])
        ]
        error_db_WN = error_db * np.stack([_normals(streams), _normals(streams)])
        return np.asarray(snr_hz_WN * 10 ** (error_db_WN / 10))

    def gains(self, prompt: int) -> Gains:
        """The amplitude gains behind `links`, read-only. Raises ValueError for a negative prompt."""
        if prompt < 0:
            raise ValueError(f"prompts count from 0, not {prompt}")
        while len(self._drawn) <= prompt:  # each follows from the one before
            self._drawn.append(self._next_gains())
        return self._drawn[prompt]

    def mean_links(self) -> Links:
        """The rates at the mean amplitude 10^(-PL/20) of each device: what is known of it without a measurement."""
        return self._rates(Gains(self._mean_gain_N, self._mean_gain_N))

    def _next_gains(self) -> Gains:
        slow_N = self._shadowed_gain_N * self._blockage.next_gain()
        down_N = slow_N * self._fading_down.next_amplitude()
        up_N = down_N if self._fading_up is None else slow_N * self._fading_up.next_amplitude()
        down_N.flags.writeable = up_N.flags.writeable = False
        return Gains(down_N, up_N)

    def _rates(self, gains: Gains, band_hz_N: FloatArray | None = None) -> Links:
        """Every link has an even part of the band unless told otherwise."""
        section, noise = self._section, noise_w_per_hz(self._section.noise_figure_db)
        if band_hz_N is None:
            band_hz_N = np.full(len(gains.down_N), link_bandwidth_hz(section, len(gains.down_N)))
        return Links(
            rate_bits_per_s(band_hz_N, section.station_power_w, gains.down_N, noise),
            rate_bits_per_s(band_hz_N, section.device_power_w, gains.up_N, noise),
        )


class _Fading:
    """|h| of each device with mean 1: a direct path and scatter, whose complex gain is a first-order Gauss-Markov
    process. Rayleigh has no direct path (K = 0), no fading has no scatter."""

    def __init__(self, section: RadioSection, streams: list[np.random.Generator]) -> None:
        ratio = {"rayleigh": 0.0, "rician": 10 ** (section.rician_k_db / 10), "none": math.inf}[section.fading]
        self._scatter = math.sqrt(1 / (1 + ratio))
        self._direct = math.sqrt(1 - 1 / (1 + ratio))
        self._mean_amplitude = rician_mean_amplitude(ratio) if math.isfinite(ratio) else 1.0
        self._kept = section.doppler_correlation
        self._streams = streams
        self._scattered_N = self._innovation()

    def next_amplitude(self) -> FloatArray:
        amplitude_N: FloatArray = np.abs(self._direct + self._scatter * self._scattered_N) / self._mean_amplitude
        self._scattered_N = self._kept * self._scattered_N + math.sqrt(1 - self._kept**2) * self._innovation()
        return amplitude_N

    def _innovation(self) -> NDArray[np.complexfloating[Any]]:
        """One draw of CN(0, 1) per device."""
        real_N, imaginary_N = _normals(self._streams), _normals(self._streams)
        gain_N: NDArray[np.complexfloating[Any]] = np.multiply(real_N + 1j * imaginary_N, math.sqrt(0.5))
        return gain_N


class _Blockage:
    """Which devices are blocked: two states each, the first drawn from their long-run share."""

    def __init__(self, section: BlockageSection | None, streams: list[np.random.Generator]) -> None:
        self._section = section
        self._streams = streams
        self._blocked_N: BoolArray | None = None

    def next_gain(self) -> FloatArray:
        if self._section is None:
            return np.ones(len(self._streams))
        drawn_N = np.array([stream.random() for stream in self._streams])
        self._blocked_N = drawn_N < self._chance_of_blocked(self._section)
        return amplitude_gain(self._section.loss_db * self._blocked_N)

    def _chance_of_blocked(self, section: BlockageSection) -> FloatArray:
        if self._blocked_N is None:
            return np.full(len(self._streams), section.p_block / (section.p_block + section.p_clear))
        return np.where(self._blocked_N, 1 - section.p_clear, section.p_block)


def rician_mean_amplitude(ratio: float) -> float:
    """E|h| for E|h|^2 = 1 and a direct path of `ratio` times the scattered power (K): sqrt(pi / 4(K+1)) L_1/2(-K).

    The Laguerre function is written as the mean over one period of e^(K/2 (cos a - 1)) (1 + K + K cos a), which is its
    Bessel functions' integral scaled so that nothing overflows; a mean over even steps converges geometrically.
    """
    cosine = np.cos(np.linspace(0, 2 * np.pi, 8192, endpoint=False))
    laguerre = np.mean(np.exp(ratio / 2 * (cosine - 1)) * (1 + ratio + ratio * cosine))
    return float(math.sqrt(math.pi / (4 * (ratio + 1))) * laguerre)


def _streams(seed: int, effect: Effect, devices: int) -> list[np.random.Generator]:
    """One generator per device for this effect alone; its key, not the order of asking, tells them apart."""
    return [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n, effect))) for n in range(devices)]


def _normals(streams: list[np.random.Generator]) -> FloatArray:
    return np.array([stream.standard_normal() for stream in streams])


def _check_distances(distance_m_N: FloatArray) -> None:
    if distance_m_N.ndim != 1 or not len(distance_m_N):
        raise ConfigError("the radio needs one distance per device; give every [[device]] a distance_m")
    for n, distance_m in enumerate(distance_m_N):
        if not LEAST_M <= distance_m <= MOST_M:
            raise ConfigError(f"device[{n}].distance_m: must be from {LEAST_M:g} to {MOST_M:g} m, not {distance_m:g}")


def _check_rates(mean: Links, distance_m_N: FloatArray) -> None:
    for name, rate_N in zip(("downlink", "uplink"), mean, strict=True):
        for n, rate in enumerate(rate_N):
            if not LEAST_BITS_PER_S <= rate <= MOST_BITS_PER_S:
                raise ConfigError(
                    f"device[{n}]: its {name} over {distance_m_N[n]:g} m would carry {rate:.3g} bit/s, outside "
                    f"{LEAST_BITS_PER_S:g} to {MOST_BITS_PER_S:g}; change distance_m, or [radio] power or bandwidth_hz"
                )
