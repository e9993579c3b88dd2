"""What a node's board says of its power, as events: every sample once, and once a join the rail it is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from testbed.wire.figures import BOARD_AGE_S, TOTAL_POWER_W, total_rail
from testbed.wire.messages import Heartbeat

SAME_SAMPLE_NS = 50_000_000  # a node's stamps of one sample differ by what it pauses between its clock and its figures
OLDEST_S = 3600.0


@dataclass(slots=True)
class BoardPower:
    """What was told so far of one node's power."""

    sampled_ns: int | None = None  # the last sample, on the node's clock
    rail_of_join: int = 0  # the join for which the rail was told

    def tell(self, device: str, joins: int, heartbeat: Heartbeat, now_ns: int, on_event: Callable[..., None]) -> None:
        """Report the heartbeat's sample if it is a new one, stamped on the base station's clock.

        The stamp, now_ns minus the sample's age, is late by the heartbeat's way here. A board that runs draws more than
        0 W: a node that says otherwise does not know.
        """
        power_w, age_s = heartbeat.figures.get(TOTAL_POWER_W), heartbeat.figures.get(BOARD_AGE_S)
        if power_w is None or age_s is None or not (power_w > 0 and 0 <= age_s <= OLDEST_S):
            return
        age_ns = int(1e9 * age_s)
        sampled_ns = heartbeat.sent_ns - age_ns
        if self.sampled_ns is not None and abs(sampled_ns - self.sampled_ns) <= SAME_SAMPLE_NS:
            return
        self.sampled_ns = sampled_ns
        if self.rail_of_join != joins:
            self.rail_of_join = joins
            on_event("power_rail", device=device, rail=total_rail(heartbeat.figures))
        on_event("power", device=device, power_w=power_w, sampled_ns=now_ns - age_ns)
