"""What splitting the band costs: `python benchmarks/allocation.py`.

Blocks of 32 rows per device, unevenly loaded, on links of 50 to 500 m that fade. Prints a table of medians; the last
line of stdout is one JSON document. `core` is the compiled loop that policies and the simulator call, each time from
the even split; from Python the arrays around it are most of the cost.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numba
import numpy as np

from testbed.policies.allocation_kernels import least_max_shares
from testbed.policies.bandwidth import block_shares, block_time_s, period_shares
from testbed.policies.base import Air, FloatArray, IntArray, State

ROW_BITS = 8 * 4096
ROW_FLOP = 352_393_216
GOALS = {"block_8_ms": 0.5, "block_256_ms": 5, "period_32_blocks_8_ms": 5, "core_8_us": 10}


def recent_blocks(rng: np.random.Generator, devices: int, blocks: int) -> tuple[IntArray, IntArray, State, Air]:
    rows_BN = np.array([rng.multinomial(32 * devices, rng.dirichlet(np.full(devices, 3))) for _ in range(blocks)])
    gain_N = 10 ** (-43.3 / 20) / rng.uniform(50, 500, devices) * rng.rayleigh(0.8, devices)
    snr_hz_WN = np.array([[10.0], [0.2]]) * gain_N**2 / 2e-20
    even_hz = 100e6 / 8
    air_row_s_WN = ROW_BITS / (even_hz * np.log2(1 + snr_hz_WN / even_hz))
    row_s_N = air_row_s_WN.sum(axis=0) + ROW_FLOP / rng.choice([0.47e12, 2e12, 5e12, 20e12], devices)
    nothing_N = np.zeros(devices)
    air = Air(even_hz * devices, snr_hz_WN, air_row_s_WN)
    state = State(row_s_N, np.ones(devices, bool), nothing_N, nothing_N, nothing_N, row_s_N, air)
    return rows_BN, np.minimum(rows_BN, 1), state, air


def median_ms(call: Callable[[int], object], seconds: float = 1.0) -> float:
    durations_ns = []
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)
    while (begin_ns := time.perf_counter_ns()) < end_ns:
        call(len(durations_ns))
        durations_ns.append(time.perf_counter_ns() - begin_ns)
    return statistics.median(durations_ns) / 1e6


@numba.njit
def repeat_core(
    fixed_s_BN: FloatArray, bits_BWN: FloatArray, snr_hz_WN: FloatArray, band_hz: float, times: int
) -> float:
    share_N, seconds = np.zeros(fixed_s_BN.shape[1]), 0.0
    for turn in range(times):
        share_N[:] = 0.0
        block = turn % len(fixed_s_BN)
        seconds += least_max_shares(fixed_s_BN[block], bits_BWN[block], snr_hz_WN, band_hz, share_N)
    return seconds


def core_us(rows_BN: IntArray, row_s_N: FloatArray, air: Air, times: int = 200) -> float:
    fixed_s_BN = rows_BN * (row_s_N - air.row_s_WN.sum(axis=0))
    bits_BWN = np.repeat(rows_BN[:, None, :], 2, axis=1) * float(ROW_BITS)

    def call(_: int = 0) -> float:
        return repeat_core(fixed_s_BN, bits_BWN, air.snr_hz_WN, air.bandwidth_hz, times)

    call()
    return median_ms(call) * 1000 / times


def costs_of(devices: int, blocks: int = 32) -> dict[str, float]:
    rows_BN, experts_BN, state, air = recent_blocks(np.random.default_rng(7), devices, blocks)
    share_N, _ = block_shares(rows_BN[0], experts_BN[0], state)

    def block(turn: int) -> object:
        return block_shares(rows_BN[turn % blocks], experts_BN[turn % blocks], state)

    def time_of_a_block(turn: int) -> object:
        return block_time_s(rows_BN[turn % blocks], experts_BN[turn % blocks], state, share_N)

    return {
        f"block_{devices}_ms": median_ms(block),
        f"core_{devices}_us": core_us(rows_BN, state.row_s_N, air),
        f"time_of_a_block_{devices}_ms": median_ms(time_of_a_block),
        f"period_{blocks}_blocks_{devices}_ms": median_ms(lambda _: period_shares(rows_BN, experts_BN, state)),
    }


def main() -> None:
    costs = {name: round(cost, 4) for devices in (8, 256) for name, cost in costs_of(devices).items()}
    for name, cost in costs.items():
        goal = f"goal {GOALS[name]}" if name in GOALS else ""
        what, _, unit = name.rpartition("_")
        print(f"{what.replace('_', ' '):26}{cost:10.4f} {unit}   {goal}")
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
