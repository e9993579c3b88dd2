"""The base station's post office: one ROUTER socket, its nodes, and the mail between rounds.

It belongs to the thread that runs the model; nobody else touches the socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import zmq
from numpy.typing import NDArray

from bs_node.registry import Node, Registry
from bs_node.telemetry import NodeTelemetry
from testbed.errors import ConfigError, MessageError, NodeError
from testbed.wire.messages import (
    Credit,
    Echo,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Refuse,
    Rejected,
    ReplyPart,
    Shape,
    Welcome,
    decode_from_node,
    encode,
)
from testbed.wire.sockets import StationSocket, send_frames

BROKEN_MESSAGES_ALLOWED = 8
LOOK_EVERY_NS = 5_000_000  # between rounds that follow each other at once
EMPTY = memoryview(b"")

EventSink = Callable[..., None]


class Mail(NamedTuple):
    """A message about a round, from a node we know."""

    node: Node
    message: ReplyPart | Credit | Rejected
    payload: memoryview
    header_bytes: int


class Station:
    """Takes nodes in, notices when they are gone, hands out mail that belongs to rounds.

    `enrolled` maps public keys to device names, None when insecure. `on_event(kind, **facts)` hears of rare events.
    """

    def __init__(
        self,
        sockets: StationSocket,
        registry: Registry,
        *,
        run: int,
        enrolled: dict[str, str] | None,
        heartbeat_ns: int,
        window_bytes: int,
        on_event: EventSink,
    ) -> None:
        self.registry, self.run = registry, run
        self._sockets, self._enrolled, self._on_event = sockets, enrolled, on_event
        self._welcome = encode(Welcome(run, heartbeat_ns, window_bytes))
        self.gone: set[int] = set()  # devices lost since a round last asked
        self._looked_ns = 0  # after connections, and for silent nodes
        self._over = False  # after goodbye nobody is lost by leaving
        self.refusals: dict[str, str] = {}  # device -> why it was refused
        self._shape_of: dict[int, bytes] = {}  # device -> what it was asked last
        self._telemetry = [NodeTelemetry() for _ in registry.nodes]  # by device

    def receive(self, timeout_ms: float) -> Mail | None:
        """The next mail of a round, all else that comes before it dealt with; None if nothing comes in the timeout."""
        while (frames := self._sockets.receive(timeout_ms)) is not None:
            mail = self._open(frames)
            if mail is not None:
                return mail
            timeout_ms = 0
        now_ns = time.monotonic_ns()
        if timeout_ms > 0 or now_ns - self._looked_ns > LOOK_EVERY_NS:
            self._looked_ns = now_ns
            self._watch_connections()
            for node in self.registry.newly_silent(now_ns):  # while messages come, nobody is suspected
                self._lose(node, "silent")
        return None

    def _open(self, frames: list[zmq.Frame]) -> Mail | None:
        routing_id = frames[0].bytes
        node = self.registry.node_at(routing_id)
        try:
            message = decode_from_node(frames[1].bytes if len(frames) > 1 else b"")
        except MessageError as error:
            self.broken(node, error)
            return None
        now = time.monotonic_ns()
        if isinstance(message, Hello):
            self._greet(message, frames[0], now)
            return None
        if node is None:
            self._post(routing_id, encode(HelloAgain()))
            return None
        self._heard(node, now)
        if isinstance(message, (ReplyPart, Credit, Rejected)):
            if isinstance(message, Rejected):
                self._on_event("request_rejected", device=node.name, reason=message.reason)
            return Mail(node, message, frames[2].buffer if len(frames) > 2 else EMPTY, len(frames[1]))
        if isinstance(message, Heartbeat):
            self._beat(node, message, now)
        else:
            node.busy_until_ns = now + message.estimate_ns
        return None

    def _beat(self, node: Node, heartbeat: Heartbeat, now: int) -> None:
        """Compare the clocks, and answer for the next comparison; report power and telemetry."""
        node.figures = heartbeat.figures
        node.power.tell(node.name, node.joins, heartbeat, now, self._on_event)
        self._telemetry[node.index].tell(node.name, heartbeat, now, self._on_event)
        try:
            if heartbeat.echoed is None:
                node.clock.one_way_up(heartbeat.sent_ns, now)
            else:
                node.clock.exchange(*heartbeat.echoed, heartbeat.sent_ns, now)
        except ValueError as error:
            self.broken(node, MessageError(str(error)))
        if node.routing_id is not None:
            self._post(node.routing_id, encode(Echo(time.monotonic_ns())))

    def _heard(self, node: Node, now: int) -> None:
        if node.silent:
            self._on_event("node_heard_again", device=node.name)
        self.registry.heard(node, now)

    def _greet(self, hello: Hello, first_frame: zmq.Frame, now: int) -> None:
        self._watch_connections()  # an ended connection's descriptor may be this one's
        key = first_frame.get("User-Id") if self._enrolled is not None else None
        enrolled_as = self._enrolled.get(str(key), "nobody") if self._enrolled is not None else None
        reason = self.registry.refusal(hello, enrolled_as)
        if reason is not None:
            self.refusals[hello.device] = reason
            self._on_event("node_refused", device=hello.device, reason=reason)
            self._post(first_frame.bytes, encode(Refuse(reason[:500])))
            return
        known = self.registry.node_at(first_frame.bytes)
        node = self.registry.welcome(hello, first_frame.bytes, int(first_frame.get(zmq.SRCFD)), now)
        if known is None:
            self._on_event("node_joined", device=node.name, boot_id=hello.boot_id, joins=node.joins)
        self._post(first_frame.bytes, self._welcome)
        if node.index in self._shape_of:  # a welcome lifts its limit
            self._post(first_frame.bytes, self._shape_of[node.index])

    def broken(self, node: Node | None, error: MessageError) -> None:
        """A message that breaks the rules: counted, and after a few of them the node is no longer listened to."""
        self._on_event("broken_message", device=node.name if node else None, reason=str(error))
        if node is None:
            return
        node.broken_messages += 1
        if node.broken_messages >= BROKEN_MESSAGES_ALLOWED and node.routing_id is not None:
            self._post(node.routing_id, encode(Refuse(f"{node.broken_messages} broken messages, last: {error}"[:500])))
            self._lose(self.registry.forget(node), "broken messages")

    def _watch_connections(self) -> None:
        for event in self._sockets.events():
            if event.event == zmq.EVENT_DISCONNECTED:
                node = self.registry.disconnected(event.value)
                if node is not None:
                    self._lose(node, "disconnected")
        for key in self._sockets.take_refused_keys():
            self._on_event("key_refused", public_key=key)

    def _lose(self, node: Node, how: str) -> None:
        self.gone.add(node.index)
        if not self._over:
            self._on_event("node_lost", device=node.name, how=how)

    def send(self, node: Node, header: bytes, payload_RB: NDArray[np.uint8]) -> bool:
        """Hand a part to the socket: False when its queue is full. A node that is not there is in `gone`."""
        if node.routing_id is None:
            self.gone.add(node.index)
            return False
        try:
            send_frames(self._sockets.socket, node.routing_id, header, payload_RB)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._lose(self.registry.forget(node), "unreachable")
            return False
        return True

    def shape(self, node: Node, up_bits_per_s: float) -> bool:
        """Ask a node to shape what it sends us to this rate of TCP payload, now and after each welcome.

        In force once it has read this: before whatever is sent to it later. A node that was not started with
        --shape-interface says so in its output and ignores it. False where it is away (its welcome will tell it) or
        its queue is full: ask again. Raises ConfigError unless the rate is from 1 kbit/s to 100 Gbit/s.
        """
        try:
            header = encode(Shape(float(up_bits_per_s)))
        except ValueError as error:
            raise ConfigError(f"rate shaping: {node.name}: {error}") from None
        self._shape_of[node.index] = header
        return node.routing_id is not None and self._post(node.routing_id, header)

    def _post(self, routing_id: bytes, header: bytes) -> bool:
        """A small message; whoever is gone does not get it, nor who has too many to read: False."""
        try:
            send_frames(self._sockets.socket, routing_id, header)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def wait_for_all(self, timeout_s: float, still_possible: Callable[[], None]) -> None:
        """Until every device has joined. Raises NodeError naming those that did not, or why one was refused.

        `still_possible` is asked meanwhile and raises when waiting has become pointless.
        """
        deadline = time.monotonic() + timeout_s
        while missing := self.registry.missing():
            self.receive(50)
            still_possible()
            for device, reason in self.refusals.items():
                raise NodeError(f"{device} was refused: {reason}")
            if time.monotonic() > deadline:
                raise NodeError(
                    f"{', '.join(missing)} did not join within {timeout_s:g} s: see their output, or raise "
                    "[timeouts] join_s"
                )

    def say_goodbye(self, drain_s: float = 0.5) -> None:
        """Tell every node that the run is over, and give them up to `drain_s` to hear it: they then disconnect."""
        self._over = True
        for node in self.registry.nodes:
            if node.routing_id is not None:
                self._post(node.routing_id, encode(Goodbye()))
        deadline_s = time.monotonic() + drain_s
        while any(node.available for node in self.registry.nodes) and time.monotonic() < deadline_s:
            self.receive(10)
