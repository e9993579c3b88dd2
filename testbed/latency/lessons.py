"""What one round teaches, in one compiled pass: each block predicted first, then learnt from."""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.latency.fit import dot, learn
from testbed.native import native, read, write

LONGEST_S = 86_400.0  # a round of a day is no measurement

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
READ_1, READ_2 = read(types.float64, 1), read(types.float64, 2)


@native(
    write(types.float64, 3), write(types.float64, 4), write(types.float64, 3), write(types.float64, 1),
    write(types.int64, 1), write(types.float64, 1), read(types.int64, 1), read(types.int64, 2), READ_2, READ_2, READ_1,
    READ_1, types.float64, write(types.float64, 2),
)  # fmt: skip
def teach_all(
    coef_NQC: Floats,
    spread_NQCC: Floats,
    manner_NQM: Floats,
    slowdown_N: Floats,
    lessons_N: Ints,
    taught_at_s_N: Floats,
    device_B: Ints,
    what_B4: Ints,
    seconds_B4: Floats,
    air_ratio_B2: Floats,
    now_s_B: Floats,
    row_bytes_2: Floats,
    memory_rounds: float,
    predicted_s_B3: Floats,
) -> int:
    """Learn from B blocks in their order. Q: compute, down, up. Returns the first that is no measurement; B if none.

    what: rows, experts, bytes down, bytes up. seconds: compute, down, up, and both ways together, NaN where unknown.
    air_ratio: how many times the even split's rate each way had, so that a row then weighed as 1 / ratio of one: only
    the part that goes with the bytes is restated, a delay is not. predicted: as it was, in the block's own share.
    """
    for i in range(device_B.size):
        device, first = device_B[i], lessons_N[device_B[i]] == 0
        compute_C, down_C, up_C = coef_NQC[device, 0], coef_NQC[device, 1], coef_NQC[device, 2]
        rows, experts = float(what_B4[i, 0]), float(what_B4[i, 1])
        down_rows = what_B4[i, 2] / row_bytes_2[0] / air_ratio_B2[i, 0]
        up_rows = what_B4[i, 3] / row_bytes_2[1] / air_ratio_B2[i, 1]
        compute_s, down_s, up_s = seconds_B4[i, 0], seconds_B4[i, 1], seconds_B4[i, 2]
        slowdown = slowdown_N[device]
        predicted_s_B3[i, 0] = slowdown * dot(compute_C, (1.0, experts, rows))
        predicted_s_B3[i, 1] = slowdown * dot(down_C, (1.0, 0.0, down_rows))
        predicted_s_B3[i, 2] = slowdown * dot(up_C, (1.0, 0.0, up_rows))
        if not (down_s > 0 and up_s > 0):
            link_s = seconds_B4[i, 3] if np.isfinite(seconds_B4[i, 3]) else down_s + up_s
            down_share = what_B4[i, 2] / (what_B4[i, 2] + what_B4[i, 3])
            if not first:
                down_share = predicted_s_B3[i, 1] / (predicted_s_B3[i, 1] + predicted_s_B3[i, 2])
            down_s, up_s = link_s * down_share, link_s * (1 - down_share)
        total_s = compute_s + down_s + up_s
        if not (compute_s >= 0 and down_s >= 0 and up_s >= 0 and 0 < total_s < LONGEST_S):
            return i
        manner_QM, spread_QCC = manner_NQM[device], spread_NQCC[device]
        learn(compute_C, spread_QCC[0], manner_QM[0], first, experts, rows, compute_s, memory_rounds)
        learn(down_C, spread_QCC[1], manner_QM[1], first, 0.0, down_rows, down_s, memory_rounds)
        learn(up_C, spread_QCC[2], manner_QM[2], first, 0.0, up_rows, up_s, memory_rounds)
        lessons_N[device] += 1
        taught_at_s_N[device] = now_s_B[i]
        if slowdown > 1:  # a reply came: it is as slow as that reply, no longer as the loss
            expected_s = slowdown * (
                dot(compute_C, (1.0, experts, rows))
                + dot(down_C, (1.0, 0.0, down_rows))
                + dot(up_C, (1.0, 0.0, up_rows))
            )
            slowdown_N[device] *= min(max(total_s / expected_s, 1 / slowdown), 1.0)
    return device_B.size
