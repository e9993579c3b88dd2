"""What nodes tell of temperature, clocks, power, memory and load, as events: at most one a second and node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from testbed.wire.figures import HOST, Sample, samples
from testbed.wire.messages import Heartbeat

EVERY_NS = 950_000_000  # heartbeats jitter: two that are sent a second apart are both told
OLDEST_S = 3600.0
SAME_SAMPLE_NS = 50_000_000  # a node's stamps of one sample differ by what it pauses between its clock and its figures
HIGHEST = 1e15  # bytes of a machine's memory, with room
MOST_NAMES = 64  # of a node during a run, besides those of every machine


@dataclass(slots=True)
class NodeTelemetry:
    """What was told so far of one node."""

    told_ns: int | None = None
    sampled_ns: dict[str, int] = field(default_factory=dict)  # the last sample of host and board, on the node's clock
    names: set[str] = field(default_factory=set)
    is_full: bool = False

    def tell(self, device: str, heartbeat: Heartbeat, now_ns: int, on_event: Callable[..., None]) -> None:
        """Report the heartbeat's samples that are new, stamped on the base station's clock, unless it is too soon.

        A stamp, now_ns minus the sample's age, is late by the heartbeat's way here. Names beyond MOST_NAMES are left
        out, and that is said once: a node cannot fill the log with names.
        """
        if self.told_ns is not None and now_ns - self.told_ns < EVERY_NS:
            return
        new = [
            {"sampled_ns": now_ns - int(1e9 * sample.age_s), "figures": self._kept(sample, device, on_event)}
            for group, sample in samples(heartbeat.figures).items()
            if self._is_new(group, sample, heartbeat.sent_ns)
        ]
        if new:
            self.told_ns = now_ns
            on_event("telemetry", device=device, samples=new)

    def _is_new(self, group: str, sample: Sample, sent_ns: int) -> bool:
        if not 0 <= sample.age_s <= OLDEST_S:
            return False
        sampled_ns, last_ns = sent_ns - int(1e9 * sample.age_s), self.sampled_ns.get(group)
        if last_ns is not None and abs(sampled_ns - last_ns) <= SAME_SAMPLE_NS:
            return False
        self.sampled_ns[group] = sampled_ns
        return True

    def _kept(self, sample: Sample, device: str, on_event: Callable[..., None]) -> dict[str, float | None]:
        own = [name for name in sample.figures if name not in HOST and name not in self.names]
        free = MOST_NAMES - len(self.names)
        self.names.update(own[:free])
        if own[free:] and not self.is_full:
            self.is_full = True
            on_event("telemetry_full", device=device, names=MOST_NAMES)
        left_out = set(own[free:])
        return {name: _short(value) for name, value in sample.figures.items() if name not in left_out}


def _short(value: float | None) -> float | None:
    """Six digits: no sensor has more, and a log of hours is read by people too."""
    return None if value is None or abs(value) > HIGHEST else float(f"{value:.6g}")
