"""Compiled loops of the simulation: many draws of the channel, all blocks of the routing in each.

B blocks, D draws, N devices, W ways (down, up), E experts; tokens and choices as in `routing.PackedBlocks`. They decide
as `TopK` and `WLR` do, bit for bit, where every device is there and every latency known.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import inlined, native, read, write
from testbed.policies.allocation_kernels import least_max_shares
from testbed.policies.base import BoolArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MASS, EQ8_S, SENT, KEPT, ORPHANED, SUMS = range(6)  # S: what is summed up over all blocks of a draw, and how many


@inlined
def _fastest(holds_BNE: BoolArray, block: int, token_s_N: Floats, device_E: Ints, token_s_E: Floats) -> None:
    """The device of least token_s that holds the expert, the first of equals, and its time; -1 where there is none."""
    for expert in range(len(device_E)):
        device_E[expert], token_s_E[expert] = -1, np.inf
        for device in range(len(token_s_N)):
            if holds_BNE[block, device, expert] and token_s_N[device] < token_s_E[expert]:
                device_E[expert], token_s_E[expert] = device, token_s_N[device]


@native(
    read(types.int64, 1),
    read(types.int64, 2),
    read(types.float64, 2),
    read(types.boolean, 3),
    read(types.float64, 2),
    types.float64,
    write(types.int64, 3),
    write(types.int64, 3),
    write(types.float64, 2),
)
def select_by_ratio(
    first_B: Ints,
    expert_TK: Ints,
    weight_TK: Floats,
    holds_BNE: BoolArray,
    token_s_DN: Floats,
    theta: float,
    rows_DBN: Ints,
    experts_DBN: Ints,
    sums_DS: Floats,
) -> int:
    """Algorithm 1 in every draw and block; theta 0 keeps every pair. Writes rows and experts touched, and the sums.

    Latencies are known and finite. Loops over tokens and choices stand here and take no slices, for speed.
    """
    draws, blocks = rows_DBN.shape[0], rows_DBN.shape[1]
    experts, choices = holds_BNE.shape[2], expert_TK.shape[1]
    device_E, rows_E = np.empty(experts, np.int64), np.empty(experts, np.int64)
    token_s_E, ratio_K = np.empty(experts), np.empty(choices)
    for draw in range(draws):
        mass, eq8_s, all_kept, orphaned = 0.0, 0.0, 0, 0
        for block in range(blocks):
            _fastest(holds_BNE, block, token_s_DN[draw], device_E, token_s_E)
            rows_E[:] = 0
            for token in range(first_B[block], first_B[block + 1]):
                best = 0.0
                for choice in range(choices):
                    expert = expert_TK[token, choice]
                    if expert >= 0:
                        ratio_K[choice] = weight_TK[token, choice] / token_s_E[expert]
                        best = max(best, ratio_K[choice])
                slowest_s, kept, named = 0.0, 0, 0
                for choice in range(choices):
                    expert = expert_TK[token, choice]
                    if expert < 0:
                        continue
                    named += 1
                    low = best > 0 and ratio_K[choice] / (ratio_K[choice] + best) < theta
                    if low or device_E[expert] < 0:
                        mass += weight_TK[token, choice]
                    else:
                        kept += 1
                        rows_E[expert] += 1
                        slowest_s = max(slowest_s, token_s_E[expert])
                eq8_s += slowest_s
                all_kept += kept
                orphaned += named > 0 and kept == 0
            rows_DBN[draw, block], experts_DBN[draw, block] = 0, 0
            for expert in range(experts):
                if rows_E[expert] > 0:
                    rows_DBN[draw, block, device_E[expert]] += rows_E[expert]
                    experts_DBN[draw, block, device_E[expert]] += 1
        sums_DS[draw, MASS], sums_DS[draw, EQ8_S] = mass, eq8_s
        sums_DS[draw, SENT] = sums_DS[draw, KEPT] = all_kept
        sums_DS[draw, ORPHANED] = orphaned
    return 0


@native(
    *(read(types.int64, 3), read(types.int64, 3)),
    *(read(types.float64, 2), read(types.float64, 2), read(types.float64, 2), read(types.float64, 3)),
    write(types.float64, 3),
)
def device_times(
    rows_DBN: Ints,
    experts_DBN: Ints,
    base_s_DN: Floats,
    expert_s_DN: Floats,
    compute_row_s_DN: Floats,
    air_row_s_DBN: Floats,
    device_s_DBN: Floats,
) -> int:
    """Every device's own time of every block, 0 where it has no rows. `air_row_s_DBN`: B may be 1, the same for all."""
    draws, blocks, devices = rows_DBN.shape
    for draw in range(draws):
        for block in range(blocks):
            of_block = block if air_row_s_DBN.shape[1] > 1 else 0
            for device in range(devices):
                rows, device_s = rows_DBN[draw, block, device], 0.0
                if rows > 0:
                    expert_s = experts_DBN[draw, block, device] * expert_s_DN[draw, device]
                    work_s = max(rows * compute_row_s_DN[draw, device], expert_s)
                    device_s = base_s_DN[draw, device] + work_s + rows * air_row_s_DBN[draw, of_block, device]
                device_s_DBN[draw, block, device] = device_s
    return 0


@native(read(types.int64, 3), read(types.float64, 3), read(types.float64, 3), write(types.float64, 2))
def turns_on_one_air(rows_DBN: Ints, device_s_DBN: Floats, air_row_s_DWN: Floats, block_s_DB: Floats) -> int:
    """A block's time where all links share the airtime. They take equal turns, so a device's rows are down when every
    other one has had as much of the air or is done; and no block is over before all transmissions are."""
    draws, blocks, devices = rows_DBN.shape
    for draw in range(draws):
        for block in range(blocks):
            rows_N, slowest_s, air_s = rows_DBN[draw, block], 0.0, 0.0
            for device in range(devices):
                down_s = rows_N[device] * air_row_s_DWN[draw, 0, device]
                air_s += down_s + rows_N[device] * air_row_s_DWN[draw, 1, device]
                waits_s = -down_s
                for other in range(devices):
                    waits_s += min(down_s, rows_N[other] * air_row_s_DWN[draw, 0, other])
                slowest_s = max(slowest_s, device_s_DBN[draw, block, device] + waits_s)
            block_s_DB[draw, block] = max(slowest_s, air_s)
    return 0


@native(
    *(read(types.int64, 3), read(types.int64, 3)),
    *(read(types.float64, 2), read(types.float64, 2), read(types.float64, 2)),
    *(read(types.float64, 1), read(types.float64, 3), types.float64, write(types.float64, 3)),
)
def best_shares(
    rows_DBN: Ints,
    experts_DBN: Ints,
    base_s_DN: Floats,
    expert_s_DN: Floats,
    compute_row_s_DN: Floats,
    row_bits_W: Floats,
    snr_hz_DWN: Floats,
    bandwidth_hz: float,
    share_DBN: Floats,
) -> int:
    """`bandwidth.block_shares` of every block, from costs as `State` has them: experts and rows add up."""
    draws, blocks, devices = rows_DBN.shape
    bits_WN, fixed_s_N = np.empty((len(row_bits_W), devices)), np.empty(devices)
    for draw in range(draws):
        for block in range(blocks):
            for device in range(devices):
                rows, fixed_s = rows_DBN[draw, block, device], 0.0
                if rows > 0:
                    expert_s = experts_DBN[draw, block, device] * expert_s_DN[draw, device]
                    fixed_s = base_s_DN[draw, device] + expert_s + rows * compute_row_s_DN[draw, device]
                fixed_s_N[device] = fixed_s
                for way in range(len(row_bits_W)):
                    bits_WN[way, device] = rows * row_bits_W[way]
            share_DBN[draw, block] = 0.0
            least_max_shares(fixed_s_N, bits_WN, snr_hz_DWN[draw], bandwidth_hz, share_DBN[draw, block])
    return 0
