"""Places a model's experts on the nodes of a nodes file, and says in figures and words what that comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from testbed.checkpoint.balance import Balance, Capacity, balance, even_usage
from testbed.checkpoint.job import Source, SplitJob
from testbed.checkpoint.manifest import BS_NAME, Dtype
from testbed.checkpoint.nodes_file import NodesFile
from testbed.checkpoint.observed import expert_usage, node_speeds
from testbed.checkpoint.placement import Held, Placement, as_mapping, place, round_robin
from testbed.cli.output import table
from testbed.errors import ConfigError

MAX_RANGES = 12  # that a cell of the table lists


@dataclass(frozen=True)
class Wishes:
    """How to place: what was measured, and what is allowed."""

    usage: Path | None = None  # folder of a run
    speeds: Path | None = None  # folder of a run or probe, or a probe.json
    copies: int = 1
    by_layer: bool = False


@dataclass(frozen=True)
class NodePlan:
    name: str
    weight_format: str
    held_as: str  # in its memory
    experts_by_layer: tuple[tuple[int, ...], ...]
    needs_bytes: int
    memory_bytes: float | None
    load_share: float  # of all rows that the model sends to nodes
    time_share: float  # its time for an average block over that of the block's slowest node


@dataclass(frozen=True)
class Plan:
    source: Source
    job: SplitJob
    nodes: tuple[NodePlan, ...]
    base_station_bytes: int
    base_station_memory_bytes: float | None
    against_default: float | None  # block time over that of expert q on node q mod N; None: that leaves a node empty
    reasons: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        nodes = [
            {
                **{"name": node.name, "weight_format": node.weight_format, "held_as": node.held_as},
                **{"needs_bytes": node.needs_bytes, "memory_bytes": node.memory_bytes},
                **{"load_share": node.load_share, "time_share": node.time_share},
            }
            for node in self.nodes
        ]
        station = {"needs_bytes": self.base_station_bytes, "memory_bytes": self.base_station_memory_bytes}
        return {
            **{"model": self.source.name, "hub_commit": self.source.commit},
            **{"layers": len(self.source.layers), "dtype": self.job.dtype},
            **{"experts_per_layer": self.source.experts_per_layer, "total_bytes": self.job.total_bytes},
            **{"base_station": station, "nodes": nodes, "placement": self.mapping()},
            **{"block_time_against_default": self.against_default, "reasons": list(self.reasons)},
        }

    def mapping(self) -> dict[str, list[int] | list[list[int]]]:
        return as_mapping(self.job.placement, self.job.devices)

    def as_toml(self) -> str:
        lines = [f"# {self.source.name}: {reason}" for reason in self.reasons]
        lines += ["[placement]", *(f"{name} = {held}" for name, held in self.mapping().items())]
        return "\n".join(lines) + "\n"

    def table(self) -> Table:
        heads = ["node", "experts", "stored as", "held as", "needs GB", "has GB", "share of load", "busy"]
        rows = [
            [
                *(node.name, _experts(node.experts_by_layer), node.weight_format, node.held_as),
                *(f"{node.needs_bytes / 1e9:.2f}", _gigabytes(node.memory_bytes)),
                *(f"{100 * node.load_share:.1f} %", f"{100 * node.time_share:.0f} %"),
            ]
            for node in self.nodes
        ]
        station = [f"{self.base_station_bytes / 1e9:.2f}", _gigabytes(self.base_station_memory_bytes), "-", "-"]
        return table(f"Placement of {self.source.name}", heads,
                     [*rows, ["base station", "-", "as stored", "as stored", *station]])  # fmt: skip

    def refuse_if_short(self) -> None:
        """Raises ConfigError naming the first node, or the base station, that has less memory than it needs."""
        needs = [(f"node {node.name}", node.needs_bytes, node.memory_bytes) for node in self.nodes]
        for who, needed, has in [*needs, ("base_station", self.base_station_bytes, self.base_station_memory_bytes)]:
            if has is not None and needed > has:
                raise ConfigError(
                    f"{who}: needs {needed / 1e9:.2f} GB and has {has / 1e9:.2f} GB: {(needed - has) / 1e9:.2f} GB are "
                    "missing; place fewer experts there, choose a smaller weight_format, or give it memory_gb"
                )


def make_plan(
    source: Source, nodes: NodesFile, wishes: Wishes, *, given: Mapping[str, Held] | None = None, dtype: Dtype | None
) -> Plan:
    """given: a placement that is taken as it is. Raises ConfigError where memory does not suffice or nothing fits."""
    stored = dtype or source.stored_dtype
    usage_LE, words = _usage(source, wishes.usage)
    speeds = node_speeds(wishes.speeds, nodes.names) if wishes.speeds else {n.name: n.speed for n in nodes.nodes}
    held = nodes.held_formats(stored)
    capacities = [
        Capacity(n.name, tuple(source.expert_bytes(held[n.name])), n.memory_bytes, speeds[n.name]) for n in nodes.nodes
    ]
    mapping = given if given is not None else nodes.placement
    if mapping is None:
        found = balance(capacities, usage_LE, copies=wishes.copies, by_layer=wishes.by_layer)
        mapping = as_mapping(found.placement(), nodes.names)
        words += _how(nodes, wishes, found)
    else:
        words = ["as given", *words]
    job = SplitJob.of(source, nodes.names, mapping, dtype, nodes.weight_formats(stored))
    state = _state(capacities, usage_LE, job.placement)
    default, against = _default_time(capacities, usage_LE, source.experts_per_layer), None
    if default is not None:
        against = state.block_time() / default
        words.append(_against(against))
    plan = Plan(
        source,
        job,
        _node_plans(job, state, held),
        job.bytes_of(BS_NAME),
        None if nodes.base_station.memory_gb is None else nodes.base_station.memory_gb * 1e9,
        against,
        tuple(words),
    )
    plan.refuse_if_short()
    return plan


def _usage(source: Source, run_dir: Path | None) -> tuple[list[NDArray[np.float64]], list[str]]:
    if run_dir is None:
        return even_usage(source.experts_per_layer, [layer.top_k for layer in source.layers]), []
    usage_LE, tokens = expert_usage(run_dir, source.experts_per_layer)
    busiest = max(float(usage_E.max() / usage_E.mean()) for usage_E in usage_LE)
    return usage_LE, [
        f"usage from {run_dir} ({tokens} tokens over all layers; the busiest expert {busiest:.1f} x mean)"
    ]


def _how(nodes: NodesFile, wishes: Wishes, found: Balance) -> list[str]:
    experts = max(map(len, found.usage_LE))
    words = []
    if wishes.speeds is not None:
        words.append(f"speeds from {wishes.speeds}, links included")
    elif len({node.speed for node in nodes.nodes}) > 1:
        words.append("speeds as the nodes file gives them")
    if as_mapping(found.placement(), nodes.names) == round_robin(experts, nodes.names):
        paper = ", as in the paper" if experts == len(nodes.nodes) else f" mod {len(nodes.nodes)}"
        words.append(f"expert q of every layer on node q{paper}: nothing better was found")
    else:
        limited = "within each node's memory, " if any(node.memory_gb for node in nodes.nodes) else ""
        words.append(f"{limited}the busiest expert first, each where a block gets longer by the least")
    copies = sum(int((holds_NE.sum(0) - 1).sum()) for holds_NE in found.holds_LNE)
    if copies:
        words.append(
            f"{copies} further copies of experts over all layers, where memory is left and a block gets shorter"
        )
    return words


def _against(ratio: float) -> str:
    if abs(ratio - 1) < 1e-9:
        return "expected time of a block: that of expert q on node q mod N"
    change = f"{100 * abs(1 - ratio):.0f} % {'less' if ratio < 1 else 'more'}"
    return f"expected time of a block: {change} than with expert q on node q mod N, whatever its memory"


def _state(capacities: Sequence[Capacity], usage_LE: Sequence[NDArray[np.float64]], placement: Placement) -> Balance:
    state = Balance(capacities, usage_LE)
    index = {node.name: n for n, node in enumerate(capacities)}
    for layer, row in enumerate(placement):
        for expert, holders in enumerate(row):
            for name in holders:
                state.give(index[name], expert, [layer])
    return state


def _default_time(
    capacities: Sequence[Capacity], usage_LE: Sequence[NDArray[np.float64]], experts_per_layer: Sequence[int]
) -> float | None:
    """None where there are more nodes than experts: some would hold none."""
    names = [node.name for node in capacities]
    if max(experts_per_layer) < len(names):
        return None
    return _state(capacities, usage_LE, place(experts_per_layer, names)).block_time()


def _node_plans(job: SplitJob, state: Balance, held_as: Mapping[str, str]) -> tuple[NodePlan, ...]:
    rows_NL, times_NL = state.rows_NL(), state.times_NL()
    share_N = rows_NL.sum(1) / rows_NL.sum()
    busy_N = times_NL.mean(1) / times_NL.max(0).mean()
    held = {
        node.name: tuple(tuple(np.flatnonzero(holds_NE[n]).tolist()) for holds_NE in state.holds_LNE)
        for n, node in enumerate(state.nodes)
    }
    return tuple(
        NodePlan(
            *(node.name, job.weight_format(node.name), held_as[node.name], held[node.name]),
            sum(size * len(experts) for size, experts in zip(node.expert_bytes_L, held[node.name], strict=True)),
            *(node.memory_bytes, float(share), float(busy)),
        )
        for node, share, busy in zip(state.nodes, share_N, busy_N, strict=True)
    )


def _experts(by_layer: Sequence[Sequence[int]]) -> str:
    """`0-3 7` in every layer, or how many where layers differ."""
    if any(experts != by_layer[0] for experts in by_layer):
        counts = sorted({len(experts) for experts in by_layer})
        return f"{'-'.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} a layer"
    ranges: list[list[int]] = []
    for expert in by_layer[0]:
        if ranges and expert == ranges[-1][1] + 1:
            ranges[-1][1] = expert
        else:
            ranges.append([expert, expert])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:MAX_RANGES]]
    return " ".join(shown) + (" ..." if len(ranges) > MAX_RANGES else "")


def _gigabytes(count: float | None) -> str:
    return "not said" if count is None else f"{count / 1e9:.2f}"
