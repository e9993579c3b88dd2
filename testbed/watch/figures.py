"""What a view of a running testbed shows. Times are emulated ones where the run's are stretched: without dilation.

Of "the last rounds" means RECENT_ROUNDS. None is unknown; nothing stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

RECENT_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class PolicyProgress:
    """How far one policy has come, and what it left out."""

    policy: str
    prompts_done: int
    prompts: int | None  # of all; None for a run that has no workload
    rounds: int
    tokens: int  # that passed the first MoE block
    pairs: int  # (token, expert) that the gate chose
    kept_pairs: int
    gate_mass: float
    dropped_mass: float  # of that: whose own expert's output is missing, or came from another expert
    orphaned_tokens: int  # of a block, without any expert's output

    @property
    def kept_fraction(self) -> float | None:
        return self.kept_pairs / self.pairs if self.pairs else None

    @property
    def dropped_fraction(self) -> float | None:
        return self.dropped_mass / self.gate_mass if self.gate_mass else None


@dataclass(frozen=True, slots=True)
class Requests:
    """What became of one device's requests under one policy, and what they weighed, headers included."""

    policy: str
    answered: int
    late: int
    lost: int
    rejected: int
    invalid: int
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of a link: medians of the last rounds. A one-way time has its bound, or is not told at all."""

    asked_bits_per_s: float | None  # None without a band
    measured_bits_per_s: float | None  # bytes over the one-way time
    one_way_s: float | None
    bound_s: float | None  # the most by which that can be wrong


@dataclass(frozen=True, slots=True)
class LastRequests:
    """One device and its link over the last rounds, by what was answered in time."""

    waited_for: float  # share of the rounds that waited for it to the end, or in vain
    expected_s: float | None  # median: way down, node, way up
    measured_s: float | None  # median: first byte out until last byte in, by the BS's clock
    measured_over_expected: float | None  # median of the ratios
    down: Way
    up: Way


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a node told last of itself, by figures named as in `testbed.wire.figures`; None: a sensor that is off."""

    power_w: float | None = None  # all the board draws
    at_realtime_s: float | None = None  # of the newest sample, since 1970 by the BS's clock
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def hottest(self) -> tuple[str, float] | None:
        """Zone and °C."""
        zones = [(name.removesuffix("_c"), value) for name, value in self.known("_c")]
        return max(zones, key=lambda zone: zone[1], default=None)

    def known(self, suffix: str) -> list[tuple[str, float]]:
        """Names and values of the figures whose names end so."""
        return [(name, value) for name, value in self.figures.items() if value is not None and name.endswith(suffix)]

    def __bool__(self) -> bool:
        return self.power_w is not None or any(value is not None for value in self.figures.values())


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """One device, its link, and what was expected of it."""

    device: str
    present: bool | None  # as events tell: joined, or lost
    joins: int
    emulated: bool  # its compute is padded to another device's
    telemetry: Telemetry  # told last, which may be long ago
    requests: tuple[Requests, ...]  # by policy
    last: LastRequests | None  # None before the first round

    def count(self, status: str) -> int:
        """Requests of all policies with this outcome."""
        return sum(getattr(of_policy, status) for of_policy in self.requests)

    @property
    def failed(self) -> int:
        """Its connection went away, or it refused the request, or its reply was broken."""
        return self.count("lost") + self.count("rejected") + self.count("invalid")


@dataclass(frozen=True, slots=True)
class LastRound:
    """The newest round, and how the last ones went."""

    round: int
    policy: str
    prompt: int
    layer: int
    phase: str
    dilation: float
    at_realtime_s: float | None  # seconds since 1970 by the BS's clock
    median_s: float | None  # a round's time over the last rounds, emulated
    p95_s: float | None
    rounds_per_s: float | None  # over the last rounds, by the wall clock: stretched and with all that lies between them
    tokens_per_s: float | None  # through the whole model, likewise


@dataclass(frozen=True, slots=True)
class Incident:
    """A rare event that is worth a line."""

    at_realtime_s: float | None
    kind: str
    device: str | None
    what: str | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is shown. `state` is running, finished or aborted."""

    run: str
    state: str
    model: str | None
    links: str | None  # in words
    last: LastRound | None  # None before the first round
    policies: tuple[PolicyProgress, ...]
    nodes: tuple[NodeFigures, ...]
    incidents: tuple[Incident, ...]  # the newest few, oldest first

    @property
    def compute(self) -> str:
        """Where the nodes' compute times come from, in words."""
        emulated = sum(node.emulated for node in self.nodes)
        return f"emulated on {emulated} of {len(self.nodes)} devices" if emulated else "measured"

    @property
    def prompts_done(self) -> int:
        return sum(policy.prompts_done for policy in self.policies)

    @property
    def prompts(self) -> int | None:
        """Of all policies together."""
        known = [policy.prompts for policy in self.policies if policy.prompts is not None]
        return sum(known) if known else None

    @property
    def current(self) -> PolicyProgress | None:
        """The policy that runs now, or ran last."""
        return next((p for p in self.policies if self.last is not None and p.policy == self.last.policy), None)

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "compute": self.compute, "prompts_done": self.prompts_done, "prompts": self.prompts}
