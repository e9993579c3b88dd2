"""Emulated links in the kernel: each node in a network namespace of its own, behind a veth pair shaped at both ends.

The base station stays where it is and listens on `station_host`, one address that every namespace reaches, each over
its own link. Both ends of a link shape what they send, so each direction has air of its own (`medium = "fdd"`). Taking
turns (tdd, shared) is not offered: what tc can share among classes is a rate, not airtime, on which a slow link takes
longer for the same bytes.

A rate is one of TCP payload, as the relay's is. tc counts whole frames; the size table (`stab overhead`) takes the
headers off each, so a frame weighs what it carries, whatever its size, and a bare acknowledgement one byte. For that
no segment may be merged with another before tc sees it (`gso_max_segs 1`). A token bucket lets the first bytes pass at
once: one frame, and what the rate makes of the time by which the kernel's timer may be late. An idle link carries B
bytes in (B - burst) / rate, so frames are small: at 5 Mbit/s a row of 4 kB is early by 0.7 kB, or one sixth.

Links never lose anything: a sender waits for room in the queue of its own side, so its congestion control finds
nothing to control. It is fixed to reno, since BBR takes the bucket for a slower link.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.channel.kernel import (
    SUBNETS,
    drop_connections,
    free_subnet,
    missing,
    names,
    remove,
    remove_leftovers,
    run,
)
from testbed.errors import ConfigError

MOST_DEVICES = 253
NODE_END = "air0"
MTU_BYTES = 576
ETHERNET_BYTES, HEADER_BYTES = 14, 66  # Ethernet, IPv4, TCP with timestamps
TIMER_LATE_S = 200e-6
QUEUE_BYTES = 4 * 2**20
LOWEST_BITS_PER_S, HIGHEST_BITS_PER_S = 100.0, 1e10


class _Link(NamedTuple):
    """One device's link: its namespace, the name of the base station's end, the device's address."""

    namespace: str
    station_end: str
    address: str


class NamespaceLinks:
    """Links of a run, with the interface of `LinkEmulator`, except that nothing records true times.

    `station_host` is what the base station must listen on and nodes connect to, at the base station's own port;
    `namespaces` says which device's process must `enter` which namespace. Links are unlimited until the first
    `set_links`. Use as a context manager, or call `close`. What a killed process left is removed by the next one.
    """

    def __init__(self, devices: Sequence[str], medium: str = "fdd", *, mtu_bytes: int = MTU_BYTES) -> None:
        """Make namespaces and links. A larger `mtu_bytes` costs less CPU time, and lets more bytes pass at once.

        Raises ConfigError where that cannot be.
        """
        if medium != "fdd":
            raise ConfigError(f'links = "namespaces" has no medium = {medium!r}, only "fdd": set links = "relay"')
        if not 128 <= mtu_bytes <= 9000:
            raise ConfigError(f"mtu_bytes = {mtu_bytes}: it must be from 128 to 9000")
        if len(devices) > MOST_DEVICES:
            raise ConfigError(f'links = "namespaces" has room for {MOST_DEVICES} devices: there are {len(devices)}')
        reason = missing()
        if reason is not None:
            raise ConfigError(reason)
        remove_leftovers()
        self.devices = list(devices)
        self._mtu_bytes = mtu_bytes
        subnet = free_subnet()
        self.station_host = str(SUBNETS[subnet][1])
        self._links = {
            device: _Link(*names(os.getpid(), subnet, n), str(SUBNETS[subnet][n + 2]))
            for n, device in enumerate(devices)
        }
        self.namespaces = {device: link.namespace for device, link in self._links.items()}
        self._down_bits_per_s = self._up_bits_per_s = self._per_device(np.inf)
        self._stalled: set[str] = set()
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        links = self._links.values()
        run({("ip", None): [line for link in links for line in self._station_end(link)]})
        run({("ip", link.namespace): ["link set lo up", *self._node_end(link)] for link in links})
        self._shape()

    def _station_end(self, link: _Link) -> list[str]:
        end, frames = link.station_end, f"mtu {self._mtu_bytes} gso_max_segs 1"
        return [
            f"netns add {link.namespace}",
            f"link add {end} {frames} type veth peer name {NODE_END} {frames} netns {link.namespace}",
            f"address add {self.station_host}/32 dev {end}",
            f"link set {end} up",
            f"route add {link.address}/32 dev {end} src {self.station_host} congctl reno",
        ]

    def _node_end(self, link: _Link) -> list[str]:
        """Its address stays when it is taken down, its route does not."""
        return [
            f"address replace {link.address}/32 dev {NODE_END}",
            f"link set {NODE_END} up",
            f"route replace {self.station_host}/32 dev {NODE_END} src {link.address} congctl reno",
        ]

    def __enter__(self) -> NamespaceLinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_links(
        self, prompt: int, down_bits_per_s: ArrayLike, up_bits_per_s: ArrayLike, delay_s: ArrayLike = 0.0
    ) -> None:
        """Rates of every device, of TCP payload, in force on return. Each is one value per device, or one for all.

        Raises ConfigError for rates that are below 100 bit/s, and for any delay: there is no netem to count on.
        """
        down, up, delay = map(self._per_device, (down_bits_per_s, up_bits_per_s, delay_s))
        for name, rates in (("down", down), ("up", up)):
            for device, rate in zip(self.devices, rates, strict=True):
                if not rate >= LOWEST_BITS_PER_S:
                    need = f"it must be at least {LOWEST_BITS_PER_S:g}"
                    raise ConfigError(f"links of prompt {prompt}: {name} rate of {device} is {rate} bit/s: {need}")
        if delay.any():
            raise ConfigError('links = "namespaces" has no delay: set delay_s = 0, or links = "relay"')
        self._down_bits_per_s, self._up_bits_per_s = down, up
        self._shape()

    def cut(self, device: str) -> None:
        """Drop its connections and let it reach nobody, until `restore`."""
        link = self._link(device)
        run({("ip", link.namespace): [f"link set {NODE_END} down"]})
        drop_connections(None, link.address)
        drop_connections(link.namespace, self.station_host)

    def restore(self, device: str) -> None:
        link = self._link(device)
        run({("ip", link.namespace): self._node_end(link)})

    def stall(self, device: str) -> None:
        """Keep its connections, but move nothing, until `resume`; bytes wait at their senders.

        Who wants to send gives up after 7 s, as the kernel does; ZeroMQ's heartbeats do so earlier.
        """
        self._link(device)
        self._stalled.add(device)
        self._shape()

    def resume(self, device: str) -> None:
        """Bytes move again at once, or at their sender's next attempt, every half second."""
        self._link(device)
        self._stalled.discard(device)
        self._shape()

    def reset(self, device: str) -> None:
        """Drop its connections with a TCP reset; new ones are welcome."""
        drop_connections(None, self._link(device).address)

    def close(self) -> None:
        """Remove all of it. Processes left in a namespace keep running there, without a link."""
        remove((link.namespace, link.station_end) for link in self._links.values())

    def _shape(self) -> None:
        """Put the rates in force, everything at once: 2 ms per namespace if one waited for the other."""
        commands: dict[tuple[str, str | None], list[str]] = {("tc", None): []}
        for n, (device, link) in enumerate(self._links.items()):
            commands["tc", None].append(self._bucket(device, link.station_end, self._down_bits_per_s[n]))
            commands["tc", link.namespace] = [self._bucket(device, NODE_END, self._up_bits_per_s[n])]
        run(commands)

    def _bucket(self, device: str, end: str, rate_bits_per_s: float) -> str:
        """A bucket too small for any frame moves none."""
        rate = min(rate_bits_per_s, HIGHEST_BITS_PER_S)
        burst_bytes = self._mtu_bytes + ETHERNET_BYTES + round(rate / 8 * TIMER_LATE_S)
        return (
            f"qdisc replace dev {end} root stab overhead -{HEADER_BYTES} linklayer ethernet "
            f"tbf rate {round(rate)}bit burst {1 if device in self._stalled else burst_bytes} limit {QUEUE_BYTES}"
        )

    def _per_device(self, values: ArrayLike) -> NDArray[np.float64]:
        try:
            return np.broadcast_to(np.asarray(values, np.float64), (len(self.devices),))
        except ValueError:
            raise ConfigError(f"links: {values!r} is not one value for each of {len(self.devices)} devices") from None

    def _link(self, device: str) -> _Link:
        if device not in self._links:
            raise ConfigError(f"links: no device {device!r}; there are {', '.join(self.devices)}")
        return self._links[device]
