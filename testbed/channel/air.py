"""When a byte leaves: links with a rate and a delay, and the air through which they transmit. No socket, no clock.

Times are nanoseconds of the caller's clock, which never goes backwards from one call to the next. They are floats, so
that a thousand pieces of a fraction of a nanosecond too much do not add up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from testbed.errors import ConfigError

MEDIA = ("fdd", "tdd", "shared")
BIT_NS_PER_BYTE = 8e9  # bits of a byte, nanoseconds of a second


class Piece:
    """Bytes that are transmitted in one go. Its times are there once its transmission has begun."""

    __slots__ = ("air_ns", "begin_ns", "due_ns", "end_ns", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.begin_ns = self.end_ns = self.due_ns = self.air_ns = math.nan


PieceT = TypeVar("PieceT", bound=Piece)


class Link:
    """One direction of a device's link, [bit/s] and [ns]; every one is unlimited until it is tuned."""

    def __init__(self, air: Air) -> None:
        self.air = air
        self.bits_per_s, self.delay_ns = math.inf, 0.0

    def tune(self, bits_per_s: float, delay_ns: float, now_ns: float) -> None:
        """From now on; what is being transmitted keeps the rate and the delay with which it began."""
        self.air.advance(now_ns)
        self.bits_per_s, self.delay_ns = bits_per_s, delay_ns

    def air_ns(self, piece: Piece) -> float:
        """How long a piece takes to transmit."""
        return piece.size_bytes * BIT_NS_PER_BYTE / self.bits_per_s


class Lane(Generic[PieceT]):
    """The pieces of one connection in one direction, in order: those that wait for the air, and those after it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.waiting: deque[PieceT] = deque()
        self.flying: deque[PieceT] = deque()
        self.held = False
        self.ready_ns = 0.0  # since when its first waiting piece could have begun
        self.last_due_ns = 0.0

    def offer(self, piece: PieceT, now_ns: float) -> None:
        """A piece has arrived."""
        self.link.air.advance(now_ns)
        self.waiting.append(piece)
        if len(self.waiting) == 1 and not self.held:
            self.link.air.enter(self, now_ns)

    def hold(self, now_ns: float) -> None:
        """Transmit nothing more. What had begun is in `flying` and not to be delivered while `held`."""
        self.link.air.leave(self, now_ns)
        self.held = True

    def resume(self, now_ns: float) -> None:
        if self.held and self.waiting:
            self.link.air.enter(self, now_ns)
        self.held = False

    def clear(self, now_ns: float) -> None:
        """Forget all pieces."""
        self.link.air.leave(self, now_ns)
        self.waiting.clear()
        self.flying.clear()


class Air:
    """What one transmission at a time can use. Lanes take turns in the order in which they came, a piece a turn."""

    def __init__(self) -> None:
        self.free_ns = 0.0
        self._turns: deque[Lane[Any]] = deque()

    def enter(self, lane: Lane[Any], now_ns: float) -> None:
        lane.ready_ns = now_ns
        self._turns.append(lane)

    def leave(self, lane: Lane[Any], now_ns: float) -> None:
        self.advance(now_ns)
        if lane in self._turns:
            self._turns.remove(lane)

    def advance(self, now_ns: float) -> None:
        """Begin all transmissions that begin until now."""
        turns = self._turns
        while turns:
            lane = turns[0]
            begin_ns = max(self.free_ns, lane.ready_ns)
            if begin_ns > now_ns:
                return
            turns.popleft()
            self._transmit(lane, begin_ns)
            if lane.waiting:
                turns.append(lane)

    def _transmit(self, lane: Lane[Any], begin_ns: float) -> None:
        piece, link = lane.waiting.popleft(), lane.link
        piece.begin_ns, piece.air_ns = begin_ns, link.air_ns(piece)
        self.free_ns = piece.end_ns = begin_ns + piece.air_ns
        piece.due_ns = lane.last_due_ns = max(piece.end_ns + link.delay_ns, lane.last_due_ns)
        lane.flying.append(piece)

    def wake_ns(self) -> float:
        """No piece that has not begun yet is due before this; infinite if none waits."""
        if not self._turns:
            return math.inf
        lane, alone = self._turns[0], len(self._turns) == 1
        piece: Piece = lane.waiting[0]
        end_ns = max(self.free_ns, lane.ready_ns) + lane.link.air_ns(piece)
        return end_ns + lane.link.delay_ns if alone else end_ns


def make_links(medium: str, devices: Sequence[str]) -> list[tuple[Link, Link]]:
    """(down, up) of each device: air of its own each (fdd), one air a device (tdd), one air for all (shared).

    Raises ConfigError for another medium.
    """
    if medium not in MEDIA:
        raise ConfigError(f"medium = {medium!r}: not one of {', '.join(MEDIA)}")
    if medium == "fdd":
        return [(Link(Air()), Link(Air())) for _ in devices]
    airs = [Air() for _ in devices] if medium == "tdd" else [Air()] * len(devices)
    return [(Link(air), Link(air)) for air in airs]
