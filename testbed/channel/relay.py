"""The relay process: one loop that carries every byte between the base station and its nodes.

Outside both programs, so that ZeroMQ and CURVE run end to end. It ends when the pipe to its parent does.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from select import select
from typing import Any

from testbed.channel.air import make_links
from testbed.channel.connection import Connection, Limits, Stream
from testbed.channel.record import DOWN, UP, LinkRecord
from testbed.collector import keep_what_is_loaded
from testbed.errors import WdmoeError

# A timed sleep ends some tens of microseconds late: wake up earlier by these, and look again and again for the rest.
WAKE_EARLY_NS = 30_000
TIMER_SLACK = Path("/proc/self/timerslack_ns")  # 50 us by default, which every release would be late
Command = Mapping[str, Any]


class Device:
    """A device's door, its link and its connections."""

    def __init__(self, index: int, host: str) -> None:
        self.index = index
        self.connections: set[Connection] = set()
        self.stalled = False
        self.reserved = _bound(host, 0)  # nobody else gets the port while the device is cut
        self.port = int(self.reserved.getsockname()[1])
        self._host = host
        self.door: socket.socket | None = None

    def open_door(self) -> socket.socket:
        self.door = _bound(self._host, self.port)
        self.door.listen()
        return self.door


def _bound(host: str, port: int) -> socket.socket:
    end = socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    end.setblocking(False)
    end.bind((host, port))
    return end


class Relay:
    """Doors, connections, and the loop over them."""

    def __init__(self, pipe: Pipe, settings: Mapping[str, Any], record: LinkRecord) -> None:
        self._pipe, self._record = pipe, record
        self._station = (settings["station_host"], settings["station_port"])
        self._limits = Limits(settings["quantum_bytes"], settings["room_bytes"])
        self._links = make_links(settings["medium"], settings["devices"])
        self._airs = list({link.air for pair in self._links for link in pair})
        self._selector = selectors.DefaultSelector()
        self._streams: dict[Stream, Connection] = {}
        self._accepted = self._lost_framing = 0
        self._commands: dict[str, Callable[[Command], Any]] = {
            "links": self._tune,
            "cut": self._cut,
            "restore": self._restore,
            "stall": self._stall,
            "resume": self._resume,
            "reset": self._reset,
            "stats": self._stats,
        }
        self.devices = [Device(index, settings["host"]) for index in range(len(self._links))]
        for device in self.devices:
            self._open(device)
        self._selector.register(pipe, selectors.EVENT_READ, self._obey)
        self.running = True

    def serve(self) -> None:
        """Until the parent says close or is gone."""
        while self.running:
            for key, events in self._wait():
                key.data(events)
            now_ns = time.monotonic_ns()
            for air in self._airs:
                air.advance(now_ns)
            for stream, connection in list(self._streams.items()):
                if stream.due_ns() <= now_ns:
                    connection.deliver(stream, now_ns)

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Sleep until a socket or the next delivery: a selector's own timeout is in whole milliseconds."""
        next_ns = min(
            min((air.wake_ns() for air in self._airs), default=float("inf")),
            min((stream.due_ns() for stream in self._streams), default=float("inf")),
        )
        sleep_ns = next_ns - time.monotonic_ns() - WAKE_EARLY_NS
        if sleep_ns > 0:
            select([self._selector], [], [], None if sleep_ns == float("inf") else sleep_ns / 1e9)
        return self._selector.select(0)

    def _open(self, device: Device) -> None:
        self._selector.register(device.open_door(), selectors.EVENT_READ, lambda _: self._let_in(device))

    def _let_in(self, device: Device) -> None:
        if device.door is None:
            return
        with suppress(OSError):  # it may be gone again
            near, _ = device.door.accept()
            near.setblocking(False)
            far = socket.socket()
            far.setblocking(False)
            far.connect_ex(self._station)  # a refusal shows at the first read
            self._join(device, near, far)

    def _join(self, device: Device, near: socket.socket, far: socket.socket) -> None:
        def forget(closed: Connection) -> None:
            device.connections.discard(closed)
            for stream in closed.streams:
                self._lost_framing += stream.framing.lost
                self._streams.pop(stream, None)

        links = self._links[device.index]
        connection = Connection(
            self._accepted, device.index, links, (near, far), self._limits, self._selector, self._record, forget
        )
        self._accepted += 1
        device.connections.add(connection)
        for stream in connection.streams:
            self._streams[stream] = connection
            stream.held = device.stalled

    def _obey(self, _events: int) -> None:
        try:
            command = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self.running = False
            return
        if command["do"] == "close":
            self.running = False
        else:
            say(self._pipe, {"answer": self._commands[command["do"]](command)})

    def _tune(self, command: Command) -> None:
        now_ns = time.monotonic_ns()
        self._record.prompt = command["prompt"]
        for pair, *rates, delay_s in zip(self._links, command["down"], command["up"], command["delay_s"], strict=True):
            for direction in (DOWN, UP):
                pair[direction].tune(rates[direction], delay_s * 1e9, now_ns)

    def _cut(self, command: Command) -> None:
        device = self.devices[command["device"]]
        if device.door is not None:
            self._selector.unregister(device.door)
            device.door.close()
            device.door = None
        for connection in list(device.connections):
            connection.close()

    def _restore(self, command: Command) -> None:
        device = self.devices[command["device"]]
        if device.door is None:
            self._open(device)

    def _stall(self, command: Command) -> None:
        device, now_ns = self.devices[command["device"]], time.monotonic_ns()
        device.stalled = True
        for connection in device.connections:
            for stream in connection.streams:
                stream.hold(now_ns)

    def _resume(self, command: Command) -> None:
        device, now_ns = self.devices[command["device"]], time.monotonic_ns()
        device.stalled = False
        for connection in device.connections:
            for stream in connection.streams:
                stream.resume(now_ns)

    def _reset(self, command: Command) -> None:
        for connection in list(self.devices[command["device"]].connections):
            connection.close(reset=True)

    def _stats(self, _command: Command) -> dict[str, float]:
        return {
            "accepted": self._accepted,
            "open": len(self._streams) // 2,
            "queued_bytes": sum(stream.queued_bytes for stream in self._streams),
            "frames": self._record.frames,
            "unrecorded_streams": self._lost_framing + sum(stream.framing.lost for stream in self._streams),
            "cpu_s": time.process_time(),
        }

    def close(self) -> None:
        """Everything that is open."""
        for device in self.devices:
            self._cut({"device": device.index})
            device.reserved.close()
        self._selector.close()


def run_relay(pipe: Pipe, settings: bytes) -> None:
    """The process. Says its ports, answers each command once it is in force, and writes the record at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which closes this
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(OSError):
        TIMER_SLACK.write_text("1")
    keep_what_is_loaded()
    wanted = json.loads(settings)
    record = LinkRecord(wanted["devices"])
    try:
        relay = Relay(pipe, wanted, record)
    except OSError as error:
        say(pipe, {"error": f"cannot listen on {wanted['host']}: {error.strerror}: give an address of this machine"})
        return
    say(pipe, {"answer": [device.port for device in relay.devices]})
    try:
        relay.serve()
    finally:
        relay.close()
        failure = _written(record, wanted["record"])
    say(pipe, {"error": failure} if failure else {"answer": None})


def _written(record: LinkRecord, path: str | None) -> str | None:
    """What went wrong, if anything did."""
    try:
        if path is not None:
            record.write(Path(path))
    except WdmoeError as error:
        return str(error)
    return None


def say(pipe: Pipe, message: Mapping[str, Any]) -> None:
    """JSON, never pickle. A parent that is gone is found out by reading."""
    with suppress(OSError):
        pipe.send_bytes(json.dumps(message).encode())
