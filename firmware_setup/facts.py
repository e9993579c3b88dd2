"""All that a preflight reads of a board. A part that could not be read is None."""

from __future__ import annotations

from dataclasses import dataclass

from firmware_setup.cuda import Cuda
from firmware_setup.host import Memory, Thermal
from firmware_setup.l4t import UNKNOWN, Board, Software
from firmware_setup.network import Route, Wifi
from firmware_setup.power import Clocks, Power
from firmware_setup.time_sync import TimeSync


@dataclass
class Facts:
    board: Board | None = None
    software: Software | None = None
    power: Power | None = None
    clocks: Clocks | None = None
    memory: Memory | None = None
    thermal: Thermal | None = None
    cuda: Cuda | None = None
    wifi: list[Wifi] | None = None
    time: TimeSync | None = None
    route: Route | None = None  # None as well where no base station was named

    @property
    def is_jetson(self) -> bool:
        return self.board is not None and self.board.soc != UNKNOWN
