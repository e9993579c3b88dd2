"""One split of the band for several blocks: Newton's method with logarithmic barriers, compiled.

B blocks, N devices, W ways (down, up); C: a value, its first and its second derivative. Shares x are of the band that
is shared out. The sum over blocks of t_B is to be least, where t_B >= fixed + rows * air(x) for every device with rows
in the block and x >= floor. The function that Newton's method lowers has a barrier for each of these bounds: the sum
over blocks of t_B / barrier minus the logarithm of what each bound leaves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types

from testbed.native import inlined, native, read, write
from testbed.policies.allocation_kernels import Floats, rate_gain_curve

LAST_COST = 1e-5  # what the barriers of a block's devices may cost it, together; a block takes about 1
BARRIER_STEP = 0.2
NEAR_CENTRE = 1e-2  # a step that lowers the function by less is not worth taking
MOST_STEPS = 200  # per barrier
SHORTEST_STEP = 1e-9


class Blocks(NamedTuple):
    """Times are in a unit in which a block takes about 1; fixed_BN is 0 for a device without rows in the block."""

    fixed_BN: Floats
    rows_BN: Floats
    row_bits_WN: Floats
    snr_hz_WN: Floats
    bandwidth_hz: float
    floor: float


@inlined
def _row_on_air(blocks: Blocks, share_N: Floats) -> Floats:
    """air_CN: sum over W of bits / R(x * bandwidth), and its derivatives by x."""
    air_CN = np.zeros((3, len(share_N)))
    for device in range(len(share_N)):
        for way in range(len(blocks.row_bits_WN)):
            band_hz = share_N[device] * blocks.bandwidth_hz
            rate, gain, curve = rate_gain_curve(band_hz, blocks.snr_hz_WN[way, device])
            air = blocks.row_bits_WN[way, device] / rate
            relative = blocks.bandwidth_hz * gain / rate
            air_CN[0, device] += air
            air_CN[1, device] -= air * relative
            air_CN[2, device] += air * (2 * relative**2 - blocks.bandwidth_hz**2 * curve / rate)
    return air_CN


@inlined
def _lowered(blocks: Blocks, share_N: Floats, time_B: Floats, barrier: float) -> float:
    """The function that Newton's method lowers; infinite outside the bounds."""
    if share_N.min() <= blocks.floor:
        return math.inf
    slack_BN = time_B.reshape(-1, 1) - blocks.fixed_BN - blocks.rows_BN * _row_on_air(blocks, share_N)[0]
    if slack_BN.min() <= 0:
        return math.inf
    bounds = np.log(share_N - blocks.floor).sum() + (np.log(slack_BN) * (blocks.rows_BN > 0)).sum()
    return float(time_B.sum() / barrier - bounds)


@inlined
def _newton_step(blocks: Blocks, share_N: Floats, time_B: Floats, barrier: float) -> tuple[Floats, Floats, float]:
    """step_N, which leaves the sum of the shares as it is, step_B, and the slope downwards along both."""
    air_CN = _row_on_air(blocks, share_N)
    slack_BN = time_B.reshape(-1, 1) - blocks.fixed_BN - blocks.rows_BN * air_CN[0]
    inverse_BN = (blocks.rows_BN > 0) / slack_BN
    slope_BN = blocks.rows_BN * air_CN[1] * inverse_BN
    edge_N = 1 / (share_N - blocks.floor)
    gradient_N = slope_BN.sum(axis=0) - edge_N
    gradient_B = 1 / barrier - inverse_BN.sum(axis=1)
    curve_N = (slope_BN**2 + blocks.rows_BN * air_CN[2] * inverse_BN).sum(axis=0) + edge_N**2
    curve_B = (inverse_BN**2).sum(axis=1)
    mixed_BN = -slope_BN * inverse_BN
    step_N = _shares_step(gradient_N, gradient_B, curve_N, curve_B, mixed_BN)
    step_B = -(gradient_B + (mixed_BN * step_N).sum(axis=1)) / curve_B
    return step_N, step_B, float(-(gradient_N * step_N).sum() - (gradient_B * step_B).sum())


@inlined
def _shares_step(gradient_N: Floats, gradient_B: Floats, curve_N: Floats, curve_B: Floats, mixed_BN: Floats) -> Floats:
    """The blocks' times, whose part of the Hessian is diagonal, are eliminated; N equations are left."""
    matrix_NN, step_N, ones_N = np.diag(curve_N), -gradient_N, np.ones(len(gradient_N))
    for block in range(len(gradient_B)):
        for device in range(len(gradient_N)):
            pull = mixed_BN[block, device] / curve_B[block]
            step_N[device] += pull * gradient_B[block]
            for other in range(device + 1):
                matrix_NN[device, other] -= pull * mixed_BN[block, other]
    _factorise(matrix_NN)
    _solve(matrix_NN, step_N)
    _solve(matrix_NN, ones_N)
    step_N -= ones_N * (step_N.sum() / ones_N.sum())
    return step_N


@inlined
def _factorise(matrix_NN: Floats) -> None:
    """Cholesky: the lower triangle becomes its factor."""
    for row in range(len(matrix_NN)):
        for column in range(row + 1):
            rest = matrix_NN[row, column]
            for before in range(column):
                rest -= matrix_NN[row, before] * matrix_NN[column, before]
            matrix_NN[row, column] = math.sqrt(rest) if row == column else rest / matrix_NN[column, column]


@inlined
def _solve(factor_NN: Floats, right_N: Floats) -> None:
    """The right side becomes the solution."""
    size = len(right_N)
    for row in range(size):
        for before in range(row):
            right_N[row] -= factor_NN[row, before] * right_N[before]
        right_N[row] /= factor_NN[row, row]
    for row in range(size - 1, -1, -1):
        for after in range(row + 1, size):
            right_N[row] -= factor_NN[after, row] * right_N[after]
        right_N[row] /= factor_NN[row, row]


@inlined
def _descend(blocks: Blocks, share_N: Floats, time_B: Floats, barrier: float) -> int:
    """Move both to the least of one barrier's function; answers the steps that took."""
    for steps in range(MOST_STEPS):
        step_N, step_B, slope = _newton_step(blocks, share_N, time_B, barrier)
        if not slope > 2 * NEAR_CENTRE:
            return steps
        here, length = _lowered(blocks, share_N, time_B, barrier), 1.0
        while not _lowered(blocks, share_N + length * step_N, time_B + length * step_B, barrier) < (
            here - 0.1 * length * slope
        ):
            length /= 2
            if length < SHORTEST_STEP:
                return steps
        share_N += length * step_N
        time_B += length * step_B
    return MOST_STEPS


@inlined
def least_sum_shares(blocks: Blocks, share_N: Floats) -> int:
    """Write the best shares to share_N; answers the number of Newton steps.

    share_N starts as any split with all shares above the floor, whose sum stays; every block has rows. The barriers are
    lowered until each costs next to nothing (Boyd and Vandenberghe, Convex Optimization, section 11.3).
    """
    air_N = _row_on_air(blocks, share_N)[0]
    time_B = np.empty(len(blocks.rows_BN))
    for block in range(len(time_B)):
        time_B[block] = 1 + (blocks.fixed_BN[block] + blocks.rows_BN[block] * air_N).max()
    steps, cost = 0, 1.0
    while cost > LAST_COST * BARRIER_STEP:
        steps += _descend(blocks, share_N, time_B, cost / len(share_N))
        cost *= BARRIER_STEP
    return steps


@native(
    read(types.float64, 2),
    read(types.float64, 2),
    read(types.float64, 2),
    read(types.float64, 2),
    types.float64,
    types.float64,
    write(types.float64, 1),
)
def allocate_period(
    fixed_BN: Floats,
    rows_BN: Floats,
    row_bits_WN: Floats,
    snr_hz_WN: Floats,
    bandwidth_hz: float,
    floor: float,
    share_N: Floats,
) -> int:
    """`least_sum_shares`, compiled for a call from Python."""
    return least_sum_shares(Blocks(fixed_BN, rows_BN, row_bits_WN, snr_hz_WN, bandwidth_hz, floor), share_N)
