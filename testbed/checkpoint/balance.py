"""Finds a placement: by memory first, then so that the slowest node of a block takes the least time.

A block waits for its slowest node, so what is made small is the sum over layers of the longest time of a node, in rows
of a token over the node's speed. Rows of a replicated expert are shared by its holders in proportion to their speeds.

N nodes, L layers, E experts of a layer. Every result is a function of the arguments alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from testbed.checkpoint.placement import Placement
from testbed.errors import ConfigError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TIE = 12  # decimals to which times are told apart, so that rounding decides nothing


@dataclass(frozen=True)
class Capacity:
    """What a node can take. `expert_bytes_L`: of one expert of each layer, in the node's weight format."""

    name: str
    expert_bytes_L: tuple[int, ...]
    memory_bytes: float | None = None  # None: no limit is known
    speed: float = 1.0  # rows per second, in any unit that all nodes share


class Balance:
    """A placement in the making: who holds what, what room is left, how long each node takes for each layer."""

    def __init__(self, nodes: Sequence[Capacity], usage_LE: Sequence[Floats]) -> None:
        self.nodes, self.usage_LE = nodes, usage_LE
        self.speed_N = np.array([node.speed for node in nodes])
        self.bytes_NL = np.array([node.expert_bytes_L for node in nodes], np.float64)
        limits = [np.inf if node.memory_bytes is None else node.memory_bytes for node in nodes]
        self.free_N = np.array(limits, np.float64)
        self.holds_LNE: list[Bools] = [np.zeros((len(nodes), len(usage_E)), bool) for usage_E in usage_LE]

    def layers_with(self, expert: int, group: Sequence[int]) -> list[int]:
        return [layer for layer in group if expert < len(self.usage_LE[layer])]

    def size_N(self, layers: Sequence[int]) -> Floats:
        """What an expert of these layers takes on each node."""
        size_N: Floats = self.bytes_NL[:, layers].sum(1)
        return size_N

    def give(self, node: int, expert: int, layers: Sequence[int]) -> None:
        for layer in layers:
            self.holds_LNE[layer][node, expert] = True
        self.free_N[node] -= self.size_N(layers)[node]

    def rows_NL(self) -> Floats:
        """Rows of a token that each node computes, of each layer; experts that are nowhere yet do not count."""
        columns = []
        for holds_NE, usage_E in zip(self.holds_LNE, self.usage_LE, strict=True):
            speed_NE = holds_NE * self.speed_N[:, None]
            columns.append((speed_NE / np.maximum(speed_NE.sum(0), 1e-300) * usage_E).sum(1))
        return np.stack(columns, 1)

    def times_NL(self) -> Floats:
        times_NL: Floats = self.rows_NL() / self.speed_N[:, None]
        return times_NL

    def block_time(self) -> float:
        """Mean time of a layer's slowest node, for one token."""
        return float(self.times_NL().max(0).mean())

    def is_empty_N(self) -> Bools:
        held_LN = np.stack([holds_NE.any(1) for holds_NE in self.holds_LNE])
        return np.asarray(~held_LN.any(0), bool)

    def placement(self) -> Placement:
        names = [node.name for node in self.nodes]
        return tuple(
            tuple(tuple(name for name, held in zip(names, column, strict=True) if held) for column in holds_NE.T)
            for holds_NE in self.holds_LNE
        )


def balance(
    nodes: Sequence[Capacity], usage_LE: Sequence[Floats], *, copies: int = 1, by_layer: bool = False
) -> Balance:
    """usage_LE: for each layer the rows of a token that each expert gets, all equal where nothing is known.

    copies: of an expert at most, where memory is left and a block gets shorter; a node that would hold nothing gets a
    copy of a busy expert in any case. by_layer: experts of different layers are placed apart from each other.
    Expert q on node q mod N is kept where nothing better is found. Raises ConfigError where memory does not suffice.
    """
    groups = [[layer] for layer in range(len(usage_LE))] if by_layer else [list(range(len(usage_LE)))]
    found = _greedy(nodes, usage_LE, groups)
    default = _round_robin(nodes, usage_LE)
    if default is not None and round(default.block_time(), TIE) <= round(found.block_time(), TIE):
        found = default
    _fill_empty(found)
    for group in groups:
        while copies > 1 and _replicate(found, group, copies):
            pass
    return found


def even_usage(experts_per_layer: Sequence[int], top_k: Sequence[int]) -> list[Floats]:
    """Every expert as busy as the next: what is assumed where nothing was measured."""
    return [np.full(experts, k / experts) for experts, k in zip(experts_per_layer, top_k, strict=True)]


def _round_robin(nodes: Sequence[Capacity], usage_LE: Sequence[Floats]) -> Balance | None:
    """None where it does not fit, or leaves a node without experts."""
    state, experts = Balance(nodes, usage_LE), max(map(len, usage_LE))
    for expert in range(experts):
        state.give(expert % len(nodes), expert, state.layers_with(expert, range(len(usage_LE))))
    return None if (state.free_N < 0).any() or experts < len(nodes) else state


def _greedy(nodes: Sequence[Capacity], usage_LE: Sequence[Floats], groups: Sequence[Sequence[int]]) -> Balance:
    """The busiest expert first, each to the node that makes the block longer by the least."""
    state = Balance(nodes, usage_LE)
    times_NL = np.zeros((len(nodes), len(usage_LE)))
    items = [(group, q) for group in groups for q in range(max(len(usage_LE[layer]) for layer in group))]

    def order(item: tuple[Sequence[int], int]) -> tuple[float, float, int]:
        layers = state.layers_with(item[1], item[0])
        return -float(state.size_N(layers).max()), -sum(float(usage_LE[l][item[1]]) for l in layers), item[1]  # noqa: E741

    for done, (group, expert) in enumerate(sorted(items, key=order)):
        layers = state.layers_with(expert, group)
        has_room_N = state.free_N >= state.size_N(layers)
        empty_N = state.is_empty_N() & has_room_N
        if not has_room_N.any():
            raise _no_room(state, expert, layers, len(items) - done)
        allowed_N = empty_N if len(items) - done <= empty_N.sum() else has_room_N
        longer_NL = (
            times_NL[:, layers] + np.array([usage_LE[layer][expert] for layer in layers]) / state.speed_N[:, None]
        )
        cost_N = np.maximum(longer_NL, times_NL[:, layers].max(0)).sum(1)
        own_N = times_NL.sum(1) - times_NL[:, layers].sum(1) + longer_NL.sum(1)
        best = int(np.lexsort((own_N.round(TIE), cost_N.round(TIE), ~allowed_N))[0])
        times_NL[best, layers] = longer_NL[best]
        state.give(best, expert, layers)
    return state


def _no_room(state: Balance, expert: int, layers: Sequence[int], left: int) -> ConfigError:
    node = int(np.argmax(state.free_N - state.size_N(layers)))
    size, free = float(state.size_N(layers)[node]), float(state.free_N[node])
    where = "all layers" if len(layers) == len(state.usage_LE) else f"layer {layers[0]}"
    others = f", and {left - 1} more" if left > 1 else ""
    return ConfigError(
        f"memory: expert {expert} of {where}{others} fits on no node: {state.nodes[node].name} has most left, "
        f"{free / 1e9:.2f} GB of {(state.nodes[node].memory_bytes or 0) / 1e9:.2f}, an expert takes {size / 1e9:.2f} "
        f"GB: {(size - free) / 1e9:.2f} GB are missing; add a node or memory_gb, or choose a smaller weight_format"
    )


def _fill_empty(state: Balance) -> None:
    """A node without experts gets a copy of a busy one."""
    everywhere = range(len(state.usage_LE))
    for node in map(int, np.flatnonzero(state.is_empty_N())):
        busiest = max(range(max(map(len, state.usage_LE))), key=lambda q: _use_of_copy(state, node, q))
        layers = state.layers_with(busiest, everywhere)
        short = float(state.size_N(layers)[node] - state.free_N[node])
        if short > 0:
            raise ConfigError(
                f"memory: node {state.nodes[node].name} has {state.free_N[node] / 1e9:.2f} GB and an expert takes "
                f"{state.size_N(layers)[node] / 1e9:.2f} GB: {short / 1e9:.2f} GB are missing; leave it out, give "
                "it memory_gb, or choose a smaller weight_format"
            )
        state.give(node, busiest, layers)


def _use_of_copy(state: Balance, node: int, expert: int) -> tuple[float, float, int]:
    """By what a copy shortens the block, else by how long its holders take for it."""
    layers = state.layers_with(expert, range(len(state.usage_LE)))
    holders_time = sum(
        float(state.usage_LE[layer][expert] / (state.speed_N @ state.holds_LNE[layer])[expert]) for layer in layers
    )
    return round(_gain(state, node, expert, layers), TIE), round(holders_time, TIE), -expert


def _replicate(state: Balance, group: Sequence[int], copies: int) -> bool:
    """One more copy, the one that shortens the block most; False where none does."""
    best, choice = 10.0**-TIE, None
    for expert in range(max(len(state.usage_LE[layer]) for layer in group)):
        layers = state.layers_with(expert, group)
        holders_N = state.holds_LNE[layers[0]][:, expert]
        if holders_N.sum() >= copies:
            continue
        for node in np.flatnonzero(~holders_N & (state.free_N >= state.size_N(layers))):
            if (gain := _gain(state, int(node), expert, layers)) > best * (1 + 1e-9):
                best, choice = gain, (int(node), expert, layers)
    if choice is None:
        return False
    state.give(*choice)
    return True


def _gain(state: Balance, node: int, expert: int, group: Sequence[int]) -> float:
    """By how much the layers' slowest nodes get quicker, summed, if this node holds the expert too."""
    gain = 0.0
    for layer in state.layers_with(expert, group):
        holds_NE, usage_E = state.holds_LNE[layer], state.usage_LE[layer]
        with_N = holds_NE.copy()
        with_N[node, expert] = True
        gain += _slowest(holds_NE, usage_E, state.speed_N) - _slowest(with_N, usage_E, state.speed_N)
    return gain


def _slowest(holds_NE: Bools, usage_E: Floats, speed_N: Floats) -> float:
    """A holder of a replicated expert takes as long as any other: its rows over the holders' speeds together."""
    return float((holds_NE @ (usage_E / (speed_N @ holds_NE))).max())
