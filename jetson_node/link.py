"""The node's connection to its base station: join, be welcomed, notice when it is gone, join again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import zmq
from numpy.typing import NDArray

from testbed.errors import MessageError, NodeError, RefusedError
from testbed.shaping import UplinkShaper
from testbed.wire.messages import (
    Echo,
    Goodbye,
    Hello,
    HelloAgain,
    Message,
    Refuse,
    RequestPart,
    Shape,
    Welcome,
    decode_from_base_station,
    encode,
)
from testbed.wire.sockets import FAILED_HANDSHAKES, NodeSocket, send_frames

HELLO_EVERY_NS = 200_000_000
RETRY_AFTER_REFUSAL_NS = 1_000_000_000
LOOK_EVERY_MS = 20


class Link:
    """One DEALER socket and the state of our acquaintance with the base station.

    `make_socket` is called again after a refused handshake: ZeroMQ never retries one by itself.
    `join_timeout_s` bounds the time without a welcome from the start (NodeError); 0 waits for ever.
    `shaper` puts in force what the base station asks of our uplink; without one that is ignored, and said once.
    """

    def __init__(
        self,
        make_socket: Callable[[], NodeSocket],
        hello: Hello,
        join_timeout_s: float,
        now_ns: Callable[[], int] = time.monotonic_ns,
        shaper: UplinkShaper | None = None,
    ) -> None:
        self._make_socket, self._hello, self._now_ns = make_socket, hello, now_ns
        self._shaper, self._told_unshaped = shaper, False
        self._socket = make_socket()
        self._welcomed = self._ever_welcomed = False
        self.over = False
        self.echoed: tuple[int, int] | None = None
        self.heartbeat_ns, self.window_bytes = 500_000_000, 2**20
        self._deadline_ns = now_ns() + int(join_timeout_s * 1e9) if join_timeout_s > 0 else None
        self._next_hello_ns = self._next_heartbeat_ns = self._next_look_ns = now_ns()
        self._reopen_ns: int | None = None
        self._trouble = "no answer: is it running, and is this its address?"

    def keep(self) -> bool:
        """Look after the connection: events, greeting, joining in time. True when a heartbeat is due.

        Raises NodeError when it is too late to join. Between looks it costs next to nothing.
        """
        now = self._now_ns()
        if now < self._next_look_ns:
            return False
        self._next_look_ns = now + LOOK_EVERY_MS * 1_000_000
        for event in self._socket.events():
            self._on_event(event.event, now)
        if self._reopen_ns is not None and now >= self._reopen_ns:
            self._socket.close(linger_ms=0)
            self._socket, self._reopen_ns = self._make_socket(), None
        if self._welcomed:
            return self._heartbeat_due(now)
        if self._deadline_ns is not None and not self._ever_welcomed and now > self._deadline_ns:
            raise NodeError(f"{self._hello.device}: not taken in by the base station in time: {self._trouble}")
        if now >= self._next_hello_ns and self._reopen_ns is None:
            self._next_hello_ns = now + HELLO_EVERY_NS
            self.send(self._hello)
        return False

    def _heartbeat_due(self, now: int) -> bool:
        if now < self._next_heartbeat_ns:
            return False
        self._next_heartbeat_ns = now + self.heartbeat_ns
        return True

    def _on_event(self, event: int, now: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            self._welcomed = False
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._next_hello_ns = now
            self._trouble = "connected, but it does not answer our hello"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._trouble = f"it does not know our key: put {self._hello.device}.pub into its keys/nodes folder"
            self._reopen_ns = self._reopen_ns or now + RETRY_AFTER_REFUSAL_NS
        elif event & FAILED_HANDSHAKES:
            self._trouble = "the handshake failed: wrong bs.pub here, or one side runs with --insecure"

    def receive(self) -> tuple[RequestPart, memoryview] | None:
        """The next part of a request, the connection's own messages dealt with; None when `keep` has work again."""
        frames = self._socket.receive(LOOK_EVERY_MS)
        if frames is None:
            return None
        try:
            message = decode_from_base_station(frames[0].bytes)
        except MessageError as error:
            self._trouble = f"it sends what we cannot read: {error}"
            return None
        if isinstance(message, RequestPart):
            return message, frames[-1].buffer
        self._on_own(message)
        return None

    def _on_own(self, message: Welcome | HelloAgain | Refuse | Echo | Shape | Goodbye) -> None:
        now = self._now_ns()
        if isinstance(message, Welcome):
            self._welcomed = self._ever_welcomed = True
            self.heartbeat_ns, self.window_bytes = message.heartbeat_ns, message.window_bytes
            self._next_heartbeat_ns = now + message.heartbeat_ns
            if self._shaper is not None:
                self._shaper.lift()  # what another run asked is over
        elif isinstance(message, Shape):
            self._shape(message.up_bits_per_s)
        elif isinstance(message, Echo):
            self.echoed = (message.sent_ns, now)
        elif isinstance(message, HelloAgain):
            self._welcomed, self._next_hello_ns = False, now
        elif isinstance(message, Refuse):
            raise RefusedError(f"{self._hello.device}: refused by the base station: {message.reason}")
        else:
            self.over = True

    def _shape(self, up_bits_per_s: float) -> None:
        if self._shaper is not None:
            self._shaper.set_rate(up_bits_per_s)
        elif not self._told_unshaped:
            self._told_unshaped = True
            asked = f"the base station asks for an uplink of {up_bits_per_s:g} bit/s"
            print(
                f"{self._hello.device}: {asked}: ignored, as this node was started without --shape-interface",
                file=sys.stderr,
                flush=True,
            )

    def send(self, message: Message) -> bool:
        """Send a small message; False where there is no connection to take it."""
        return self._send(encode(message))

    def send_part(self, header: bytes, payload_RB: NDArray[np.uint8]) -> bool:
        """Send a part as soon as there is room for it; False when the connection was lost meanwhile."""
        while not self._send(header, payload_RB):
            for event in self._socket.events():
                self._on_event(event.event, self._now_ns())
            if not self._welcomed:
                return False
            self._socket.socket.poll(LOOK_EVERY_MS, zmq.POLLOUT)
        return True

    def _send(self, *frames: bytes | NDArray[np.uint8]) -> bool:
        try:
            send_frames(self._socket.socket, *frames)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()
