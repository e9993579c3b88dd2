"""How fast a block could be: the drops that a fast block needs, found from its time instead of pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numba import types

from testbed.native import inlined, native, read, write
from testbed.policies.base import DROPPED, Air, Routing, Selection, State
from testbed.policies.dropping import ROUNDING, Block, Floats, Ints, block_of, queues_of, slowest_s
from testbed.policies.joint import with_best_shares
from testbed.policies.links import least_shares, links_of
from testbed.policies.strength import Steerable, checked_share

CLOSE = 1e-10  # relative, of two times of a block
MOST_PASSES = 100


class Menu(NamedTuple):
    """What devices could be left with: M loads, of one device after the other, by ascending mass."""

    device_M: Ints
    rows_M: Ints
    experts_M: Ints
    mass_M: Floats  # dropped for it


class Oracle(Steerable):
    """The least block time that a budget of gate mass buys, by bisection over the time (ours, no paper's).

    Within a given time a device can take only so many rows; where State.air tells, the devices' least shares of the
    band for them must sum to 1 at most. Whether dropping the cheapest pairs for that fits the budget decides in which
    half the search goes on. A device loses its pairs in the order of `testbed.policies.dropping` or the lightest first,
    whichever weighs less. Meant to be run on true latencies; like every policy it takes State for what it is.

    Raises ConfigError where budget is not a number from 0 to 1.
    """

    name = "oracle"
    strength_name = "budget"

    def __init__(self, budget: float = 0.02) -> None:
        self.params: Mapping[str, Any] = {"budget": checked_share(self.name, "budget", budget)}

    def select(self, routing: Routing, state: State) -> Selection:
        block, budget = block_of(routing, state), self.params["budget"]
        device_TK = block.device_TK
        if budget > 0 and block.droppable_TK.any():
            device_TK = _fewest_in_time(block, state.air, budget * block.total_mass * ROUNDING)
        return with_best_shares(routing, state, device_TK)


def bound_s(routing: Routing, state: State, budget: float) -> float:
    """A lower bound, in seconds, on the predicted time of the block, at any shares, for whatever drops that much mass.

    Any pairs may go here, so a token may lose all, and pairs and gains in between two loads count in part; where a
    device loses r rows, as many experts go with them as r rows can be all of. It holds for what `topk` would send:
    a policy that moves pairs to other devices may be faster. Devices of unknown cost are not waited for.
    """
    block = block_of(routing, state)
    menu = _joined([_lightest_rows(block, device) for device in range(len(block.rows_NE))])
    return _least_time_s(block, state.air, menu, budget * block.total_mass * ROUNDING, in_part=True)[0]


def _lightest_rows(block: Block, device: int) -> Menu:
    mass_R = np.sort(block.mass_TK[block.device_TK == device])
    rows_E = np.sort(block.rows_NE[device][block.rows_NE[device] > 0])
    gone_M = np.arange(len(mass_R) + 1)
    experts_gone_M = np.searchsorted(np.cumsum(rows_E), gone_M, side="right")
    mass_M = np.append(0.0, np.cumsum(mass_R))
    return Menu(np.full(len(gone_M), device), len(mass_R) - gone_M, len(rows_E) - experts_gone_M, mass_M)


def _fewest_in_time(block: Block, air: Air | None, limit: float) -> Ints:
    queues = queues_of(block, limit)
    menus, dropped = [], []
    for device in range(len(block.rows_NE)):
        by_price_Q = queues.pair_Q[queues.begin_N1[device] : queues.begin_N1[device + 1]]
        by_mass_Q = by_price_Q[np.argsort(block.mass_TK.reshape(-1)[by_price_Q], kind="stable")]
        ways = [_one_by_one(block, device, pair_Q) for pair_Q in (by_price_Q, by_mass_Q)]
        joined = _joined(ways)
        order = np.argsort(joined.mass_M, kind="stable")
        menus.append(Menu(joined.device_M, joined.rows_M[order], joined.experts_M[order], joined.mass_M[order]))
        prefixes = [pair_Q[:length] for pair_Q in (by_price_Q, by_mass_Q) for length in range(len(pair_Q) + 1)]
        dropped += [prefixes[index] for index in order]
    _, choice_N = _least_time_s(block, air, _joined(menus), limit, in_part=False)
    device_TK = block.device_TK.copy()
    for choice in choice_N:
        device_TK.reshape(-1)[dropped[choice]] = DROPPED
    return device_TK


def _one_by_one(block: Block, device: int, pair_Q: Ints) -> Menu:
    """The loads of a device that loses these pairs one after the other."""
    expert_Q = block.expert_TK.reshape(-1)[pair_Q]
    rows_E = block.rows_NE[device]
    emptied_Q = np.zeros(len(pair_Q), int)
    for expert in np.unique(expert_Q):
        of_expert = np.flatnonzero(expert_Q == expert)
        emptied_Q[of_expert[-1]] = len(of_expert) == rows_E[expert]
    gone_M = np.arange(len(pair_Q) + 1)
    experts_M = np.count_nonzero(rows_E) - np.append(0, np.cumsum(emptied_Q))
    mass_M = np.append(0.0, np.cumsum(block.mass_TK.reshape(-1)[pair_Q]))
    return Menu(np.full(len(gone_M), device), rows_E.sum() - gone_M, experts_M, mass_M)


def _joined(menus: list[Menu]) -> Menu:
    device, rows, experts, mass = (np.concatenate(parts) for parts in zip(*menus, strict=True))
    return Menu(device, rows, experts, mass)


def _least_time_s(block: Block, air: Air | None, menu: Menu, limit: float, in_part: bool) -> tuple[float, Ints]:
    """A time, and the load of each device (an index of the menu) with which the block takes hardly longer.

    The time is the longest that was found not to suffice: with in_part a bound, within 1e-10 of the shortest that does.
    """
    devices = len(block.rows_NE)
    begin_N1 = np.searchsorted(menu.device_M, np.arange(devices + 1))
    choice_N, best_N = np.empty(devices, np.int64), begin_N1[:-1].copy()
    too_short_s, enough_s = 0.0, slowest_s(block, block.rows_NE)
    for _ in range(MOST_PASSES):
        if enough_s - too_short_s <= CLOSE * enough_s:
            break
        middle_s = (too_short_s + enough_s) / 2
        share_M = _shares_within(block, air, menu, middle_s)
        if _fits(begin_N1, menu.mass_M, share_M, limit, in_part, choice_N):
            enough_s, best_N = middle_s, choice_N.copy()
        else:
            too_short_s = middle_s
    return too_short_s, best_N


def _shares_within(block: Block, air: Air | None, menu: Menu, within_s: float) -> Floats:
    """The least share of the band for each load; infinite where none suffices, 0 where there is no band to share."""
    if air is None:
        cost_s_CM = block.cost_s_NC[menu.device_M].T
        cost_s_M = cost_s_CM[0] + menu.experts_M * cost_s_CM[1] + menu.rows_M * cost_s_CM[2]
        return np.where((menu.rows_M == 0) | (cost_s_M <= within_s), 0.0, np.inf)
    share_M = np.empty(len(menu.rows_M))
    least_shares(*links_of(block, air), menu.device_M, menu.rows_M, menu.experts_M, within_s, share_M)
    return share_M


@inlined
def _gain(mass_M: Floats, share_M: Floats, less: int, more: int) -> float:
    """Share of the band freed per mass dropped."""
    freed: float = (share_M[less] - share_M[more]) / (mass_M[more] - mass_M[less])
    return freed


@inlined
def _worthwhile(begin: int, end: int, mass_M: Floats, share_M: Floats, hull_H: Ints) -> int:
    """How many loads of a device, now in hull_H, lie on the lower convex hull of share over mass."""
    size = 0
    for load in range(begin, end):
        if share_M[load] == np.inf or (size > 0 and share_M[load] >= share_M[hull_H[size - 1]]):
            continue
        if size > 0 and mass_M[hull_H[size - 1]] == mass_M[load]:
            size -= 1
        while size > 1 and _gain(mass_M, share_M, hull_H[size - 2], load) >= _gain(
            mass_M, share_M, hull_H[size - 2], hull_H[size - 1]
        ):
            size -= 1
        hull_H[size] = load
        size += 1
    return size


@native(
    read(types.int64, 1),
    read(types.float64, 1),
    read(types.float64, 1),
    types.float64,
    types.boolean,
    write(types.int64, 1),
)
def _fits(
    begin_N1: Ints,
    mass_M: Floats,
    share_M: Floats,
    limit: float,
    in_part: bool,
    choice_N: Ints,
) -> int:
    """Whether loads, one per device, written to choice_N, ask for one band in all and drop no more than the limit.

    Steps along the hulls free less and less band per mass, so taking the best of all devices first is the best there
    is, but for the last step; in part, that may be taken as well.
    """
    gain_S, device_S = np.empty(len(mass_M)), np.empty(len(mass_M), np.int64)
    to_S, hull_H = np.empty(len(mass_M), np.int64), np.empty(len(mass_M), np.int64)
    steps, spent, asked = 0, 0.0, 0.0
    for device in range(len(choice_N)):
        size = _worthwhile(begin_N1[device], begin_N1[device + 1], mass_M, share_M, hull_H)
        if size == 0:
            return 0
        choice_N[device] = hull_H[0]
        spent, asked = spent + mass_M[hull_H[0]], asked + share_M[hull_H[0]]
        for index in range(1, size):
            gain_S[steps] = _gain(mass_M, share_M, hull_H[index - 1], hull_H[index])
            device_S[steps], to_S[steps] = device, hull_H[index]
            steps += 1
    open_N = np.ones(len(choice_N), np.bool_)
    for step in np.argsort(-gain_S[:steps]):
        if asked <= ROUNDING or spent > limit:
            break
        device, load = device_S[step], to_S[step]
        more = mass_M[load] - mass_M[choice_N[device]]
        if spent + more > limit and in_part:
            return int(asked - gain_S[step] * (limit - spent) <= ROUNDING)
        open_N[device] &= 0 < more <= limit - spent
        if open_N[device]:
            spent, asked = spent + more, asked + share_M[load] - share_M[choice_N[device]]
            choice_N[device] = load
    return int(asked <= ROUNDING and spent <= limit)
