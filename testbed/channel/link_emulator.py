"""Emulated links between a base station and its nodes: the handle on the relay process that is them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.channel.air import MEDIA
from testbed.channel.relay import run_relay
from testbed.errors import ConfigError, RunLogError, WdmoeError

QUANTUM_BYTES = 8192
ROOM_BYTES = 4 * 2**20
STARTED_WITHIN_S = 60.0  # the fork server may have to load torch first
ANSWERS_WITHIN_S = 5.0
RECORD_WRITTEN_WITHIN_S = 30.0
ENDS_WITHIN_S = 2.0


class LinkEmulator:
    """A TCP relay in a process of its own: nodes connect to `ports`, it connects on to the base station.

    Links are unlimited until the first `set_links`. All times and rates are real ones: who stretches time has done so.
    Use as a context manager, or call `close`. If this process dies, the relay ends by itself.
    """

    def __init__(
        self,
        devices: Sequence[str],
        station: tuple[str, int],
        medium: str,
        record: Path | None = None,
        *,
        host: str = "127.0.0.1",
        quantum_bytes: int = QUANTUM_BYTES,
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        """Start it. `station` is the base station's address and port, `host` where the relay listens.

        `medium`: `fdd`, each direction of each link has air of its own; `tdd`, both directions of a link take turns;
        `shared`, all links do, each at its own rate. A turn is at most `quantum_bytes`; a direction of a connection
        holds about `room_bytes` and then stops reading. `record` gets the true times when the emulator is closed.
        Raises ConfigError if that cannot be.
        """
        if medium not in MEDIA:
            raise ConfigError(f"medium = {medium!r}: not one of {', '.join(MEDIA)}")
        if quantum_bytes < 1 or room_bytes < 1:
            raise ConfigError(f"quantum_bytes = {quantum_bytes}, room_bytes = {room_bytes}: both must be at least 1")
        self.devices = list(devices)
        self._lock = Lock()
        settings = {
            "devices": self.devices,
            "station_host": station[0],
            "station_port": station[1],
            "medium": medium,
            "record": None if record is None else str(record),
            "host": host,
            "quantum_bytes": quantum_bytes,
            "room_bytes": room_bytes,
        }
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, json.dumps(settings).encode())
        self._process = context.Process(target=run_relay, args=arguments, name="link-emulator", daemon=True)
        try:
            self._process.start()
            theirs.close()
            self.ports = self._receive_ports()
        except BaseException:
            self._end()
            raise

    def _receive_ports(self) -> dict[str, int]:
        answer = self._receive(STARTED_WITHIN_S)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return dict(zip(self.devices, answer["answer"], strict=True))

    def __enter__(self) -> LinkEmulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_links(
        self, prompt: int, down_bits_per_s: ArrayLike, up_bits_per_s: ArrayLike, delay_s: ArrayLike = 0.0
    ) -> None:
        """Rates and one-way delay of every device, in force on return for all bytes not yet being transmitted.

        Each is one value per device, or one for all; a rate may be infinite. Raises ConfigError for rates that are not
        above 0, and delays that are negative or not finite.
        """
        down, up, delay = map(self._per_device, (down_bits_per_s, up_bits_per_s, delay_s))
        for name, rate in (("down", down), ("up", up)):
            self._check(rate > 0, rate, f"{name} rate", "bit/s", "above 0")
        self._check((delay >= 0) & np.isfinite(delay), delay, "delay", "s", "finite and at least 0")
        self._ask("links", prompt=prompt, down=down.tolist(), up=up.tolist(), delay_s=delay.tolist())

    def cut(self, device: str) -> None:
        """Drop its connections and refuse new ones, until `restore`."""
        self._ask("cut", device=self._index(device))

    def restore(self, device: str) -> None:
        self._ask("restore", device=self._index(device))

    def stall(self, device: str) -> None:
        """Keep its connections and take what comes, but move nothing, until `resume`."""
        self._ask("stall", device=self._index(device))

    def resume(self, device: str) -> None:
        self._ask("resume", device=self._index(device))

    def reset(self, device: str) -> None:
        """Drop its connections with a TCP reset; new ones are welcome."""
        self._ask("reset", device=self._index(device))

    def stats(self) -> dict[str, float]:
        """accepted, open (connections), queued_bytes, frames (recorded), unrecorded_streams (not ZMTP 3), cpu_s."""
        stats: dict[str, float] = self._ask("stats")
        return stats

    def close(self) -> None:
        """End it; it writes its record first. Returns within a bounded time. Raises RunLogError without a record."""
        if self._pipe.closed:
            return
        try:
            answer = self._exchange({"do": "close"}, RECORD_WRITTEN_WITHIN_S)
            self._process.join(ENDS_WITHIN_S)
        finally:
            self._end()
        if "error" in answer:
            raise RunLogError(answer["error"])

    def _end(self) -> None:
        self._pipe.close()
        if self._process.pid is None:
            return
        for end in (self._process.terminate, self._process.kill):
            if self._process.exitcode is None:
                end()
                self._process.join(ENDS_WITHIN_S)

    def _per_device(self, values: ArrayLike) -> NDArray[np.float64]:
        try:
            return np.broadcast_to(np.asarray(values, np.float64), (len(self.devices),))
        except ValueError:
            raise ConfigError(f"links: {values!r} is not one value for each of {len(self.devices)} devices") from None

    def _check(self, good: NDArray[np.bool_], values: NDArray[np.float64], name: str, unit: str, need: str) -> None:
        if not good.all():
            bad = int(np.argmin(good))
            raise ConfigError(f"links: {name} of {self.devices[bad]} is {values[bad]} {unit}: it must be {need}")

    def _index(self, device: str) -> int:
        if device not in self.ports:
            raise ConfigError(f"links: no device {device!r}; there are {', '.join(self.devices)}")
        return self.devices.index(device)

    def _ask(self, command: str, **values: Any) -> Any:
        return self._exchange({"do": command, **values}, ANSWERS_WITHIN_S)["answer"]

    def _exchange(self, message: dict[str, Any], within_s: float) -> dict[str, Any]:
        with self._lock:
            try:
                self._pipe.send_bytes(json.dumps(message).encode())
            except OSError:
                raise self._gone() from None
            return self._receive(within_s)

    def _receive(self, within_s: float) -> dict[str, Any]:
        try:
            if self._pipe.poll(within_s):
                answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
                return answer
        except (EOFError, OSError):
            raise self._gone() from None
        raise WdmoeError(f"the link emulator did not answer within {within_s:g} s: start the run again")

    def _gone(self) -> WdmoeError:
        self._process.join(ENDS_WITHIN_S)
        return WdmoeError(f"the link emulator has ended (exit code {self._process.exitcode}): start the run again")
