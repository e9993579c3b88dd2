"""The `[radio]` part of a run file: the true channel between the base station and its devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from testbed.config.base import Folder, Section

LEAST_M, MOST_M = 1.0, 100_000.0  # below 1 m there is no far field, which the path loss assumes
Metres = Annotated[float, Field(ge=LEAST_M, le=MOST_M, allow_inf_nan=False)]
Watts = Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
USED_WITH_A_TRACE = {"trace", "trace_max_gap_s", "bandwidth_hz", "medium", "delay_s"}


class BlockageSection(Section):
    """An obstacle that comes and goes between prompts, on each device by itself: a Markov chain of two states.

    In the long run a link is blocked in p_block / (p_block + p_clear) of the prompts, for 1 / p_clear in a row.
    """

    loss_db: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    p_block: Probability  # from one prompt to the next, clear -> blocked
    p_clear: Probability  # and blocked -> clear


class PlacementSection(Section):
    """Distances drawn from a seed, uniform between min_m and max_m.

    Uniform in distance, not in area: near and far devices are then equally frequent, where uniform in area puts seven
    of ten beyond the middle of 50 to 500 m, and placements would differ less.
    """

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    min_m: Metres = 50.0
    max_m: Metres = 500.0

    @model_validator(mode="after")
    def _the_range_is_one(self) -> PlacementSection:
        if self.max_m < self.min_m:
            raise ValueError(f"max_m ({self.max_m}) must be at least min_m ({self.min_m})")
        return self


class RadioSection(Section):
    """What decides the rates. Defaults are the paper's where it gives a figure (carrier, band, powers, Rayleigh).

    medium: under `fdd` each direction has bandwidth_hz of its own, under `tdd` the two take turns on it; either way
    each device has an even part of it. Under `shared` a link has all of it while it is on the air, and all links share
    the airtime, as on Wi-Fi.

    doppler_correlation: of the complex gain, from one prompt to the next. For devices that move at v m/s and prompts
    tau s apart, Jakes' model gives J0(2 pi f_d tau) with f_d = v * carrier / c: at 3.5 GHz and 1 m/s f_d is 11.7 Hz,
    and the correlation 0.9 after 8.7 ms, 0.5 after 21 ms. 0 is block fading without memory.
    """

    carrier_ghz: Annotated[float, Field(ge=0.1, le=300, allow_inf_nan=False)] = 3.5
    bandwidth_hz: Annotated[float, Field(ge=1000, le=1e10, allow_inf_nan=False)] = 100e6  # in total
    station_power_w: Watts = 10.0
    device_power_w: Watts = 0.2
    noise_figure_db: Annotated[float, Field(ge=0, le=50, allow_inf_nan=False)] = 7.0
    medium: Literal["fdd", "tdd", "shared"] = "fdd"
    fading: Literal["rayleigh", "rician", "none"] = "rayleigh"
    rician_k_db: Annotated[float, Field(ge=-40, le=60, allow_inf_nan=False)] = 6.0  # direct over scattered power
    shadowing_db: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] = 0.0  # standard deviation, once per device
    doppler_correlation: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    blockage: BlockageSection | None = None
    placement: PlacementSection | None = None
    trace: Folder | None = None  # a CSV of rates or SNRs over time
    trace_max_gap_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 10.0  # how long a row may hold
    delay_s: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = 0.0  # propagation and processing, one way

    @model_validator(mode="after")
    def _a_trace_stands_for_the_whole_channel(self) -> RadioSection:
        unused = sorted(self.model_fields_set - USED_WITH_A_TRACE)
        if self.trace is not None and unused:
            raise ValueError(f"{', '.join(unused)}: without effect where a trace gives the rates; remove it, or trace")
        return self
