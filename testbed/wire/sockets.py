"""The two sockets, with every option that matters set in one place.

ROUTER at the base station, DEALER at a node. CURVE with a ZAP allow-list that fails closed: with a ZAP domain that is
enforced, a handler that is not running means that nobody gets in. Routing ids stay automatic; names come from keys.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.backend
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from testbed.errors import ConfigError, NodeError
from testbed.wire.keys import KeyPair

ZAP_DOMAIN = "wdmoe"
MAX_MESSAGE_BYTES = 4 * 2**20
QUEUED_MESSAGES = 64
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 500, 1500
# As plain ints: pyzmq's flags are enums, whose every operation costs a microsecond of a round.
_EVENTS: Any = int(zmq.EVENTS)
_RCVTIMEO: Any = int(zmq.RCVTIMEO)
_POLLIN = int(zmq.POLLIN)
_SEND = zmq.backend.Socket.send  # beneath the one that looks for keywords of other kinds of sockets: half its cost
_NOW, _NOW_AND_MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT) | int(zmq.SNDMORE)
COMMON_OPTIONS = {
    zmq.LINGER: 0,
    zmq.SNDHWM: QUEUED_MESSAGES,
    zmq.RCVHWM: QUEUED_MESSAGES,
    zmq.MAXMSGSIZE: MAX_MESSAGE_BYTES,
    zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
    zmq.HEARTBEAT_TIMEOUT: HEARTBEAT_TIMEOUT_MS,
    zmq.HEARTBEAT_TTL: HEARTBEAT_TIMEOUT_MS,
    zmq.HANDSHAKE_IVL: 2000,
    zmq.TCP_MAXRT: 3000,
}
WATCHED_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(frozen=True, slots=True)
class SocketEvent:
    """What a socket's monitor saw: a zmq.Event, and its value (a file descriptor, or an error code)."""

    event: int
    value: int


class AllowList:
    """Keys that may connect. A node's name is bound to its key, so that nobody can speak for another."""

    def __init__(self, device_of_key: dict[str, str]) -> None:
        self.device_of_key = device_of_key
        self._lock = threading.Lock()
        self._refused: list[str] = []

    def callback(self, _domain: str, key: bytes) -> bool:
        """Called by the ZAP thread with the key as Z85 text."""
        public = key.decode()
        if public in self.device_of_key:
            return True
        with self._lock:
            self._refused.append(public)
        return False

    def take_refused(self) -> list[str]:
        """Public keys refused since the last call."""
        with self._lock:
            refused, self._refused = self._refused, []
        return refused


class StationSocket:
    """The base station's ROUTER, its ZAP handler and its monitor. Belongs to the thread that made it."""

    def __init__(self, host: str, port: int, keys: KeyPair | None, allow: AllowList | None) -> None:
        if (keys is None) != (allow is None):
            raise ConfigError("keys and an allow-list belong together: give both, or neither to run without protection")
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self.socket = self._context.socket(zmq.ROUTER)
        for option, value in COMMON_OPTIONS.items():
            self.socket.setsockopt(option, value)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None and allow is not None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()  # before bind: nobody gets in unasked
            self._authenticator.configure_curve_callback(domain=ZAP_DOMAIN, credentials_provider=allow)
            self.socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self.socket.curve_server = True
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        self._allow = allow
        self._monitor = self.socket.get_monitor_socket(WATCHED_EVENTS)
        self._receiver = Receiver(self.socket)
        self.port = self._bind(host, port)

    def _bind(self, host: str, port: int) -> int:
        try:
            self.socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            advice = (
                "another program has it: stop that, or set [listen] port = 0"
                if error.errno == zmq.EADDRINUSE
                else ("check [listen] host")
            )
            raise NodeError(f"cannot listen on {host}:{port}: {reason(error)}: {advice}") from None
        return int(self.socket.get_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

    def receive(self, timeout_ms: float) -> list[zmq.Frame] | None:
        """The frames of the next message, None if none comes within the timeout."""
        return self._receiver.receive(timeout_ms)

    def events(self) -> list[SocketEvent]:
        return drain_monitor(self._monitor)

    def take_refused_keys(self) -> list[str]:
        return self._allow.take_refused() if self._allow is not None else []

    def close(self) -> None:
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=500)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()


class NodeSocket:
    """A node's DEALER and its monitor."""

    def __init__(self, endpoint: str, keys: KeyPair | None, station_public: str | None) -> None:
        if (keys is None) != (station_public is None):
            raise ConfigError("a node needs its keys and the base station's public key: give both, or neither")
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        for option, value in COMMON_OPTIONS.items():
            self.socket.setsockopt(option, value)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a base station that is away
        self.socket.setsockopt(zmq.RECONNECT_IVL, 200)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, 3000)
        if keys is not None and station_public is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
            self.socket.curve_serverkey = station_public.encode()
        self._receiver = Receiver(self.socket)
        self._monitor = self.socket.get_monitor_socket(WATCHED_EVENTS | FAILED_HANDSHAKES)
        self._connect(endpoint)

    def _connect(self, endpoint: str) -> None:
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close(linger_ms=0)
            raise ConfigError(
                f"cannot connect to {endpoint!r}: {reason(error)}: give the base station as tcp://ADDRESS:PORT"
            ) from None

    def receive(self, timeout_ms: float) -> list[zmq.Frame] | None:
        """The frames of the next message, None if none comes within the timeout."""
        return self._receiver.receive(timeout_ms)

    def events(self) -> list[SocketEvent]:
        return drain_monitor(self._monitor)

    def close(self, linger_ms: int = 500) -> None:
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
        self._context.term()


class Receiver:
    """Reads whole messages. A wait is the socket's own receive timeout, a fraction of the cost of polling it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._timeout_ms = -1.0

    def receive(self, timeout_ms: float) -> list[zmq.Frame] | None:
        """The frames of the next message, None if none comes within the timeout. Nothing is copied."""
        if timeout_ms == 0:
            if not has_input(self._socket):
                return None
        elif timeout_ms != self._timeout_ms:
            self._socket.setsockopt(_RCVTIMEO, math.ceil(timeout_ms))
            self._timeout_ms = timeout_ms
        try:
            frame = self._socket.recv(copy=False)
        except zmq.Again:
            return None
        frames = [frame]
        while frame.more:
            frame = self._socket.recv(copy=False)
            frames.append(frame)
        return frames


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message is there: asked of the socket itself, a tenth of the cost of polling it."""
    return bool(int(socket.getsockopt(_EVENTS)) & _POLLIN)


def send_frames(socket: zmq.Socket[bytes], *frames: Any) -> None:
    """Hand one message to the socket, or raise zmq.Again with nothing of it taken."""
    for frame in frames[:-1]:
        _SEND(socket, frame, _NOW_AND_MORE)
    _SEND(socket, frames[-1], _NOW)


def reason(error: zmq.ZMQError) -> str:
    """Why a call failed, without the address that pyzmq adds."""
    return zmq.strerror(error.errno) if error.errno is not None else str(error)


def drain_monitor(monitor: zmq.Socket[bytes]) -> list[SocketEvent]:
    events = []
    while has_input(monitor):
        message = recv_monitor_message(monitor)
        events.append(SocketEvent(int(message["event"]), int(message["value"])))
    return events
