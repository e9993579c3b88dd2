"""The board's Wi-Fi, and the interface that leads to the base station (BS)."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from firmware_setup.machine import Machine

MOST_INTERFACES = 16
BANDS = ((2400, 2500, "2.4 GHz"), (4900, 5925, "5 GHz"), (5925, 7125, "6 GHz"), (57000, 71000, "60 GHz"))
INTERFACE_LINE = re.compile(r"^\s*Interface ([^\s/]{1,15})\s*$", re.MULTILINE)
WIDTH = re.compile(r"^\s*channel [0-9]{1,3} \([0-9.]{1,8} MHz\), width: ([0-9]{1,5}) MHz", re.MULTILINE)
FREQUENCY = re.compile(r"^\s*freq: ([0-9]{1,5})(?:\.[0-9]{1,3})?\s*$", re.MULTILINE)
SIGNAL = re.compile(r"^\s*signal: (-?[0-9]{1,3}) dBm", re.MULTILINE)
BITRATE = re.compile(r"^\s*tx bitrate: ([0-9]{1,6}(?:\.[0-9]{1,3})?) MBit/s", re.MULTILINE)
POWER_SAVE = re.compile(r"^\s*Power save: (on|off)\s*$", re.MULTILINE)
ROUTE = re.compile(r"^\S{1,64} (?:from \S{1,64} )?(?:via (?:inet6? )?(?P<via>\S{1,64}) )?dev (?P<dev>[^\s/]{1,15})\b")
LOCAL_ROUTE = re.compile(r"^local \S{1,64} (?:from \S{1,64} )?dev (?P<dev>[^\s/]{1,15})\b")
SOURCE = re.compile(r" src (\S{1,64})")
ADDRESS_LINE = re.compile(r"^([0-9a-fA-F:.]{2,64})\s", re.MULTILINE)


@dataclass(frozen=True)
class Wifi:
    """One Wi-Fi interface. Network and station names are not read: they would identify people and places."""

    interface: str
    connected: bool | None  # None: iw does not tell
    frequency_mhz: int | None
    band: str | None  # 5 GHz
    width_mhz: int | None
    signal_dbm: int | None
    tx_bitrate_mbit_per_s: float | None
    power_save: bool | None


@dataclass(frozen=True)
class Route:
    """How this board reaches the BS."""

    bs: str
    address: str | None
    interface: str | None
    medium: str | None  # wifi, ethernet, virtual (a bridge, docker0, a veth) or loopback
    source: str | None  # this board's address on the way
    via: str | None  # the gateway, where the BS is in another network
    error: str | None


def read_wifi(machine: Machine) -> list[Wifi]:
    """Every Wi-Fi interface the kernel or `iw dev` knows, in order of name."""
    listed = machine.run("iw", "dev").text
    sections = dict(parse_interfaces(listed))
    known = {name for name in machine.names("/sys/class/net") if is_wifi(machine, name)}
    return [
        _read_one(machine, name, sections.get(name, "")) for name in sorted(known | set(sections))[:MOST_INTERFACES]
    ]


def _read_one(machine: Machine, name: str, section: str) -> Wifi:
    link = machine.run("iw", "dev", name, "link")
    save = POWER_SAVE.search(machine.run("iw", "dev", name, "get", "power_save").text)
    connected, frequency_mhz, signal_dbm, bitrate = parse_link(link.text if link.good else "")
    width = WIDTH.search(section)
    return Wifi(
        interface=name,
        connected=connected,
        frequency_mhz=frequency_mhz,
        band=band_of(frequency_mhz),
        width_mhz=int(width[1]) if width else None,
        signal_dbm=signal_dbm,
        tx_bitrate_mbit_per_s=bitrate,
        power_save=None if save is None else save[1] == "on",
    )


def parse_interfaces(iw_dev: str) -> list[tuple[str, str]]:
    """Name and lines of each interface that `iw dev` lists."""
    found = list(INTERFACE_LINE.finditer(iw_dev))[:MOST_INTERFACES]
    ends = [match.start() for match in found[1:]] + [len(iw_dev)]
    return [(match[1], iw_dev[match.end() : end]) for match, end in zip(found, ends)]  # noqa: B905 - no strict in 3.8


def parse_link(iw_link: str) -> tuple[bool | None, int | None, int | None, float | None]:
    """Connected, frequency in MHz, signal in dBm and sending bit rate in Mbit/s of `iw dev IF link`."""
    first = iw_link.lstrip()
    if first.startswith("Not connected"):
        return False, None, None, None
    frequency, signal, bitrate = (pattern.search(iw_link) for pattern in (FREQUENCY, SIGNAL, BITRATE))
    return (
        True if first.startswith("Connected to ") else None,
        int(frequency[1]) if frequency else None,
        int(signal[1]) if signal else None,
        float(bitrate[1]) if bitrate else None,
    )


def band_of(frequency_mhz: int | None) -> str | None:
    if frequency_mhz is None:
        return None
    return next((name for low, high, name in BANDS if low <= frequency_mhz < high), None)


def read_route(machine: Machine, bs: str) -> Route:
    """The way to `bs`, a name or an address."""
    address = _resolve(machine, bs)
    if address is None:
        return Route(
            bs, None, None, None, None, None, f"{bs} has no address here; name the base station by its address"
        )
    answer = machine.run("ip", "route", "get", address)
    interface, source, via = parse_route(answer.text if answer.good else "")
    if interface is None:
        return Route(bs, address, None, None, None, None, answer.first_line)
    return Route(bs, address, interface, medium_of(machine, interface), source, via, None)


def _resolve(machine: Machine, bs: str) -> str | None:
    try:
        return str(ipaddress.ip_address(bs))
    except ValueError:
        found = ADDRESS_LINE.search(machine.run("getent", "ahosts", "--", bs).text)
        return found[1] if found else None


def parse_route(ip_route_get: str) -> tuple[str | None, str | None, str | None]:
    """Interface, own address and gateway of `ip route get ADDRESS`."""
    line = ip_route_get.lstrip().split("\n")[0]
    match = LOCAL_ROUTE.match(line) or ROUTE.match(line)
    if match is None:
        return None, None, None
    source = SOURCE.search(line)
    return match["dev"], source[1] if source else None, match.groupdict().get("via")


def medium_of(machine: Machine, interface: str) -> str:
    if interface == "lo":
        return "loopback"
    if is_wifi(machine, interface):
        return "wifi"
    return "ethernet" if machine.exists(f"/sys/class/net/{interface}/device") else "virtual"


def is_wifi(machine: Machine, interface: str) -> bool:
    folder = f"/sys/class/net/{interface}"
    return machine.exists(f"{folder}/phy80211") or machine.exists(f"{folder}/wireless")
