"""A virtual rack's network: a bridge on which the base station has an address, and a link per device.

A device's end of its link lies in a named network namespace, which outlives its reboots, so address, hardware address
and rate stay. A rate is one of TCP payload, each way: both ends send through a token bucket. There is no delay: not
every kernel has netem.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from pathlib import Path

from testbed.channel.kernel import NAMESPACES, SUBNETS, free_subnet
from testbed.channel.namespaces import HEADER_BYTES, QUEUE_BYTES, TIMER_LATE_S
from testbed.errors import ConfigError
from testbed.fleet.rack_system import tool

DEVICE_END = "host0"  # what systemd calls a container's interface
FRAME_BYTES = 1514
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


class RackNetwork:
    """Names and addresses of a rack's network; devices are numbered from 0."""

    def __init__(self, rack: str, subnet: str) -> None:
        self.bridge, self.table = f"wd-{rack}", f"wdmoe-{rack}"
        self.subnet = ipaddress.IPv4Network(subnet)
        self.station_address = str(self.subnet[1])

    def address(self, n: int) -> str:
        return str(self.subnet[n + 2])

    def link(self, n: int) -> str:
        """Name of a device's network namespace, and of the bridge's end of its link."""
        return f"{self.bridge}-{n}"

    def make(self, devices: int) -> None:
        lines = [
            f"link add {self.bridge} type bridge",
            f"address add {self.station_address}/{self.subnet.prefixlen} dev {self.bridge}",
            f"link set {self.bridge} up",
        ]
        for n in range(devices):
            link, mac = self.link(n), f"02:4a:{self.subnet[0].packed[1]:02x}:{self.subnet[0].packed[2]:02x}:00:{n:02x}"
            lines += [
                f"netns add {link}",
                f"link add {link} type veth peer name {DEVICE_END} address {mac} netns {link}",
                f"link set {link} master {self.bridge} up",
            ]
        tool("ip", "-batch", "-", lines=lines)
        for n in range(devices):
            address = f"address add {self.address(n)}/{self.subnet.prefixlen} dev {DEVICE_END}"
            route = f"route add default via {self.station_address}"
            lines = ["link set lo up", f"link set {DEVICE_END} up", address, route]
            tool("ip", "-n", self.link(n), "-batch", "-", lines=lines)

    def limit(self, n: int, bits_per_s: float) -> None:
        """Let a device send and be sent to at this rate. Where connections were made before, it is less exact."""
        link = self.link(n)
        burst_bytes = FRAME_BYTES + round(bits_per_s / 8 * TIMER_LATE_S)
        bucket = f"stab overhead -{HEADER_BYTES} linklayer ethernet tbf rate {round(bits_per_s)}bit"
        for where, end in (([], link), (["-n", link], DEVICE_END)):
            tool("ip", *where, "link", "set", "dev", end, "gso_max_segs", "1")
            line = f"qdisc replace dev {end} root {bucket} burst {burst_bytes} limit {QUEUE_BYTES}"
            tool("tc", *where, "-batch", "-", lines=[line])

    def set_link(self, n: int, up: bool) -> None:
        """Pull the cable, or put it back: addresses and routes stay."""
        tool("ip", "link", "set", self.link(n), "up" if up else "down")

    def is_up(self, n: int) -> bool:
        (link,) = json.loads(tool("ip", "-json", "link", "show", "dev", self.link(n)))
        return "UP" in link["flags"]

    def open_way_out(self) -> None:
        """Let devices reach whatever this machine reaches (package mirrors)."""
        rule = f"ip saddr {self.subnet} ip daddr != {self.subnet} masquerade"
        chain = f"chain post {{ type nat hook postrouting priority srcnat; {rule}; }};"
        tool("nft", "-f", "-", lines=[f"table ip {self.table} {{ {chain} }}"])
        FORWARDING.write_text("1")


def choose_subnet(wanted: str | None) -> str:
    """The subnet that is asked for, or a free one of those set aside for benchmarks (RFC 2544). Raises ConfigError."""
    if wanted is None:
        return str(SUBNETS[free_subnet()])
    try:
        subnet = ipaddress.IPv4Network(wanted)
    except ValueError as error:
        raise ConfigError(f"--subnet {wanted}: {error}: write it as 198.18.77.0/24") from None
    if not 16 <= subnet.prefixlen <= 28:
        raise ConfigError(f"--subnet {wanted}: write one of /16 to /28")
    for route in json.loads(tool("ip", "-json", "-4", "route", "show", "table", "all")):
        destination = route["dst"]
        if destination != "default" and ipaddress.IPv4Network(destination).overlaps(subnet):
            taken = f"this machine has a route to {destination}"
            raise ConfigError(f"--subnet {wanted}: {taken} already: choose another, or leave it out")
    return str(subnet)


def remove_network(rack: str, forwarding_before: str | None) -> None:
    """Remove all that carries the rack's name, as far as it is there; forwarding only where the rack's table is."""
    prefix, table = f"wd-{rack}", f"wdmoe-{rack}"
    names = [link["ifname"] for link in json.loads(tool("ip", "-json", "link", "show"))]
    for name in sorted(of_rack(prefix, names), reverse=True):  # links before their bridge
        tool("ip", "link", "delete", name)
    spaces = [path.name for path in NAMESPACES.iterdir()] if NAMESPACES.is_dir() else []
    for space in of_rack(prefix, spaces):
        tool("ip", "netns", "delete", space)
    if f"table ip {table}\n" in tool("nft", "list", "tables"):
        if forwarding_before is not None:
            FORWARDING.write_text(forwarding_before)
        tool("nft", "delete", "table", "ip", table)


def of_rack(bridge: str, names: Sequence[str]) -> list[str]:
    """Those of the names that are a rack's bridge or the link or namespace of one of its devices."""
    return [name for name in names if re.fullmatch(rf"{re.escape(bridge)}(-[0-9]+)?", name)]


def bridge_exists(rack: str) -> bool:
    return Path(f"/sys/class/net/wd-{rack}").exists()


def forwarding() -> str:
    """Whether this machine forwards packets, as the kernel says it."""
    return FORWARDING.read_text().strip()
