"""Where the time of a run's rounds went: its summary in the order of the phases, and who kept whom waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from testbed.runlog.schema import PHASES, GenerationPhase, RoundPhase
from testbed.runlog.summary import Summary
from testbed.runlog.summary_tally import Series

ONE_WAY = ("down_ns", "up_ns")
WHOLE = (RoundPhase("node", "there and back", "rtt_ns"), RoundPhase("BS", "whole round", "round_ns"))


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Emulated ms of one phase at one node (None: the base station); None where it was not measured.

    `bound_ms` is the most by which a one-way time, and so each of its quantiles, can be wrong.
    """

    where: str
    phase: str
    node: str | None
    generation: str  # prefill or decode
    count: int
    mean_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    bound_ms: float | None = None


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """One node in one kind of rounds. `alone_ms`: emulated; in which nothing but its reply was waited for."""

    node: str
    generation: str
    rounds: int
    requests: int
    bottleneck: int  # rounds that waited for it last, or in vain
    alone_ms: float
    late: int
    lost: int


def phase_times(summary: Summary, policy: int, devices: Sequence[str]) -> Iterator[PhaseTimes]:
    """Every phase in the order of a round, each node by itself, then what spans several; only nodes that were asked.

    Copies between host and GPU only where there were any.
    """
    for where, phase, column, *_, on_gpu in (*PHASES, *WHOLE):
        measured = {(s.device, s.phase): s for s in summary.series if s.policy == policy and s.column == column}
        if on_gpu and not measured:
            continue
        nodes: Sequence[int | None] = sorted({device for device, _ in measured if device is not None})
        for device in nodes or [None]:
            for generation in GenerationPhase:
                node = None if device is None else devices[device]
                named = (where, phase, node, generation.name.lower())
                series = measured.get((device, int(generation)))
                yield PhaseTimes(*named, count=0) if series is None else _times(summary, named, series)


def node_loads(summary: Summary, policy: int, devices: Sequence[str]) -> Iterator[NodeLoad]:
    """How often each node was waited for last, and what became of its requests."""
    rounds = {(counts.policy, counts.phase): counts.rounds for counts in summary.phases}
    for counts in summary.nodes:
        if counts.policy == policy:
            generation = GenerationPhase(counts.phase).name.lower()
            yield NodeLoad(
                devices[counts.device], generation, rounds[policy, counts.phase], counts.requests,
                counts.bottleneck, counts.alone_ns / 1e6, counts.late, counts.lost,
            )  # fmt: skip


def _times(summary: Summary, named: tuple[str, str, str | None, str], series: Series) -> PhaseTimes:
    bound_ms = None
    if series.column in ONE_WAY:
        bound = summary.get(series.policy, series.phase, series.device, "clock_bound_ns")
        if bound is None or bound.count < series.count:
            return PhaseTimes(*named, count=series.count)  # never without its uncertainty
        bound_ms = bound.max_ns / 1e6
    return PhaseTimes(
        *named, series.count, series.sum_ns / series.count / 1e6, series.p50_ns / 1e6, series.p95_ns / 1e6,
        series.p99_ns / 1e6, bound_ms,
    )  # fmt: skip
