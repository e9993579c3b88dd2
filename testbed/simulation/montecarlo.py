"""Every policy over every draw of the channel and every block of the routing.

Policies that have a compiled form (`ratio_threshold`) take seconds for ten thousand draws; all others are asked block
by block, as in a run. Both are told the truth of the draw, as under `estimates = "oracle"`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bs_node.band import RECENT_BLOCKS
from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, Deadline, FloatArray, Policy, Routing, Selection
from testbed.policies.selection import routed
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR
from testbed.simulation.allocation import Allocation, check_band
from testbed.simulation.draws import Draws
from testbed.simulation.kernels import (
    EQ8_S,
    KEPT,
    MASS,
    ORPHANED,
    SENT,
    SUMS,
    Floats,
    Ints,
    device_times,
    select_by_ratio,
    turns_on_one_air,
)
from testbed.simulation.routing import PackedBlocks, RoutedBlock

DRAWS_AT_ONCE = 128
Count = Callable[[int], None]  # draws that are done, more than before


@dataclass(frozen=True, slots=True)
class Simulated:
    """What one policy came to in D draws of B blocks. Sums (see `kernels`) are over the blocks of a draw."""

    block_s_DB: Floats
    sums_DS: Floats

    @classmethod
    def joined(cls, parts: Sequence[Simulated]) -> Simulated:
        return cls(np.concatenate([p.block_s_DB for p in parts]), np.concatenate([p.sums_DS for p in parts]))


def ratio_threshold(policy: Policy) -> float | None:
    """theta where the policy is Algorithm 1 or, with 0, the unmodified model; None where it is neither."""
    if type(policy) is TopK:
        return 0.0
    return float(policy.params["theta"]) if type(policy) is WLR else None


def is_quick(policy: Policy, allocation: Allocation) -> bool:
    """Ten thousand draws take seconds, not minutes."""
    return ratio_threshold(policy) is not None and allocation.is_quick


def simulate_policy(
    policy: Policy,
    allocation: Allocation,
    blocks: Sequence[RoutedBlock],
    packed: PackedBlocks,
    draws: Draws,
    count: Count = lambda _: None,
) -> Simulated:
    """All blocks in every draw. Raises ConfigError where the policy asks for what the medium does not have."""
    allocation.check(draws)
    if allocation.period == "static" and not allocation.is_even:
        allocation = replace(allocation, static_share_N=_static_shares(policy, allocation, blocks, draws.mean()))
    theta = ratio_threshold(policy)
    if theta is None:
        return asked_one_by_one(policy, allocation, blocks, packed, draws, count)

    parts: list[Simulated] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for part in threads.map(partial(selected_by_ratio, theta, allocation, packed), _chunks(draws)):
            parts.append(part)
            count(len(part.block_s_DB))
    return Simulated.joined(parts)


def _static_shares(policy: Policy, allocation: Allocation, blocks: Sequence[RoutedBlock], channel: Draws) -> FloatArray:
    """share_N by the policy's loads in the first blocks, in the one draw of `channel`."""
    state = channel.state(0)
    loads = [_load(block.routing, policy.select(block.routing, state)) for block in blocks[:RECENT_BLOCKS]]
    rows_BN, experts_BN = (np.array(load_BN) for load_BN in zip(*loads, strict=True))
    return allocation.for_period(rows_BN, experts_BN, state)


def _chunks(draws: Draws) -> Iterator[Draws]:
    for first in range(0, len(draws), DRAWS_AT_ONCE):
        yield draws.part(first, first + DRAWS_AT_ONCE)


def selected_by_ratio(theta: float, allocation: Allocation, packed: PackedBlocks, draws: Draws) -> Simulated:
    """The compiled form of `TopK` and `WLR`."""
    shape = len(draws), len(packed.prompt_B), draws.devices
    rows_DBN, experts_DBN, sums_DS = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros((len(draws), SUMS))
    select_by_ratio(
        packed.first_B, packed.expert_TK, packed.weight_TK, packed.holds_BNE, draws.token_s_DN, theta,
        rows_DBN, experts_DBN, sums_DS,
    )  # fmt: skip
    share_DBN = allocation.shares(rows_DBN, experts_DBN, draws, packed.prompt_B)
    return Simulated(block_times(rows_DBN, times_of(rows_DBN, experts_DBN, draws, share_DBN), draws), sums_DS)


def times_of(rows_DBN: Ints, experts_DBN: Ints, draws: Draws, share_DBN: Floats | None) -> Floats:
    """device_s_DBN: every device's own time of every block, at these shares of the band."""
    device_s_DBN = np.empty(rows_DBN.shape)
    air_row_s_DBN = draws.air_row_s_DBN(share_DBN)
    device_times(
        rows_DBN, experts_DBN, draws.base_s_DN, draws.expert_s_DN, draws.compute_row_s_DN, air_row_s_DBN, device_s_DBN
    )
    return device_s_DBN


def block_times(rows_DBN: Ints, device_s_DBN: Floats, draws: Draws) -> Floats:
    """block_s_DB: a block waits for its slowest device; on one shared air the devices wait for one another, too."""
    if not draws.shared:
        block_s_DB: Floats = device_s_DBN.max(axis=2)
        return block_s_DB
    block_s_DB = np.empty(rows_DBN.shape[:2])
    turns_on_one_air(rows_DBN, device_s_DBN, draws.air_row_s_DWN, block_s_DB)
    return block_s_DB


def asked_one_by_one(
    policy: Policy,
    allocation: Allocation,
    blocks: Sequence[RoutedBlock],
    packed: PackedBlocks,
    draws: Draws,
    count: Count = lambda _: None,
) -> Simulated:
    """Any policy: `select` is called for every block of every draw."""
    parts = []
    for draw in range(len(draws)):
        state = draws.state(draw)
        selections = [_checked(policy, block.routing, policy.select(block.routing, state)) for block in blocks]
        parts.append(_one_draw(selections, allocation, blocks, packed, draws.part(draw, draw + 1)))
        count(1)
    return Simulated.joined(parts)


def _checked(policy: Policy, routing: Routing, selection: Selection) -> Selection:
    if selection.device_TK.shape != routing.expert_TK.shape or selection.weight_TK.shape != routing.expert_TK.shape:
        raise ConfigError(f"policy {policy.name}: answers must have the shape of expert_TK")
    return selection


def _one_draw(
    selections: Sequence[Selection],
    allocation: Allocation,
    blocks: Sequence[RoutedBlock],
    packed: PackedBlocks,
    draw: Draws,
) -> Simulated:
    """The times of one draw's blocks, and who was too late for a deadline."""
    shape = 1, len(blocks), draw.devices
    rows_DBN, experts_DBN = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for b, (block, selection) in enumerate(zip(blocks, selections, strict=True)):
        rows_DBN[0, b], experts_DBN[0, b] = _load(block.routing, selection)
    share_DBN = allocation.shares(rows_DBN, experts_DBN, draw, packed.prompt_B)
    own = [b for b, selection in enumerate(selections) if selection.bandwidth_share_N is not None]
    if own:
        check_band(draw)
        share_DBN = np.full(shape, 1 / draw.devices) if share_DBN is None else share_DBN
        share_DBN[0, own] = [selections[b].bandwidth_share_N for b in own]
    device_s_DBN = times_of(rows_DBN, experts_DBN, draw, share_DBN)
    block_s_DB = block_times(rows_DBN, device_s_DBN, draw)
    sums_S = np.zeros(SUMS)
    for b, (block, selection) in enumerate(zip(blocks, selections, strict=True)):
        kept_TK = selection.device_TK != DROPPED
        sums_S[SENT] += kept_TK.sum()
        if selection.deadline is not None:
            end_s = deadline_s(selection.deadline, selection.device_TK, device_s_DBN[0, b])
            block_s_DB[0, b] = min(block_s_DB[0, b], end_s)
            kept_TK &= _of_pairs(device_s_DBN[0, b], selection.device_TK) <= end_s
        _add_up(block.routing, selection, kept_TK, draw.token_s_DN[0], sums_S)
    return Simulated(block_s_DB, sums_S[None])


def _load(routing: Routing, selection: Selection) -> tuple[Ints, Ints]:
    """rows_N, experts_N: what each device is sent, and how many different experts that touches."""
    expert_TK = routing.expert_TK if selection.expert_TK is None else selection.expert_TK
    sent_TK = selection.device_TK != DROPPED
    devices, experts = routing.holds_NE.shape
    place_P = selection.device_TK[sent_TK].astype(np.int64) * experts + expert_TK[sent_TK]
    rows_NE = np.bincount(place_P, minlength=devices * experts).reshape(devices, experts)
    return rows_NE.sum(axis=1), (rows_NE > 0).sum(axis=1)


def deadline_s(deadline: Deadline, device_TK: NDArray[np.integer], device_s_N: Floats) -> float:
    """When a round is over that ends `after_s` after every token has `k_min` answers, or all that it was sent for."""
    answer_s_TK = np.sort(np.where(device_TK == DROPPED, np.inf, device_s_N[device_TK]), axis=1)
    wanted_T = np.minimum((device_TK != DROPPED).sum(axis=1), deadline.k_min)
    served = np.flatnonzero(wanted_T > 0)
    return float(answer_s_TK[served, wanted_T[served] - 1].max(initial=0.0)) + deadline.after_s


def _of_pairs(value_N: Floats, device_TK: NDArray[np.integer]) -> Floats:
    """The value of every pair's device; 0 where it is DROPPED, which is -1."""
    value_TK: Floats = np.append(value_N, 0.0)[device_TK]
    return value_TK


def _add_up(
    routing: Routing, selection: Selection, kept_TK: NDArray[np.bool_], token_s_N: Floats, sums_S: Floats
) -> None:
    routed_TK = routed(routing)
    sums_S[MASS] += routing.weight_TK[routed_TK & ~kept_TK].sum(dtype=np.float64)
    sums_S[EQ8_S] += np.where(kept_TK, _of_pairs(token_s_N, selection.device_TK), 0.0).max(axis=1).sum()
    sums_S[KEPT] += kept_TK.sum()
    sums_S[ORPHANED] += (routed_TK.any(axis=1) & ~kept_TK.any(axis=1)).sum()
