"""Rates per destination by the kernel's HTB: the base station's towards its devices, a node's towards its station.

One class per destination address, whose rate is also its ceiling, so that nobody borrows. A rate is one of TCP
payload, as on emulated links. What goes anywhere else is not shaped. Everything sent to an address shares its class,
a login as well. Make a shaper before the connections it is to shape: older ones still send frames of 64 KiB, which
pass at once.

A bucket lets some bytes pass at once: a frame, and what the rate makes of the time by which the kernel's timer may be
late; HTB then lends one frame more: 3.5 kB in all at 20 Mbit/s. A change is in force on return, except that a class in
debt for a frame still waits as long as its old rate says (12 ms at 1 Mbit/s).

Not yet run on hardware: tested between network namespaces joined by veth.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from testbed.errors import ConfigError
from testbed.shaping.interface import HANDLE, Interface
from testbed.shaping.tc import Tc
from testbed.wire.messages import HIGHEST_BITS_PER_S, LOWEST_BITS_PER_S

FRAME_BYTES = 1514
TIMER_LATE_S = 200e-6
CLASS = re.compile(r"class htb \w+:([0-9a-f]+) .*?\brate (\d+)([KMGT]?)bit ")
UNIT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class _Shaper:
    """Classes for some addresses on one interface. The interface is as before after `close`.

    After a kill it is so once the next shaper of the interface starts. Made and closed in the same network namespace.
    """

    def __init__(self, interface: str, address_of: Mapping[str, str], bits_per_s_N: NDArray[np.float64]) -> None:
        self._devices, addresses = list(address_of), _checked_addresses(address_of)
        with ExitStack() as undo:
            self._interface = Interface(interface)
            undo.callback(self._interface.restore)
            for device, address in zip(self._devices, addresses, strict=True):
                self._interface.require_route(device, address)
            self._tc = Tc()
            undo.callback(self._tc.close)
            self._set(bits_per_s_N, [self._interface.qdisc_line()], self._filters(addresses))
            self._interface.one_segment_per_frame()
            self._undo = undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the interface back as it was."""
        self._undo.close()

    def _set(self, bits_per_s_N: NDArray[np.float64], before: Sequence[str] = (), after: Sequence[str] = ()) -> None:
        """Put rates in force, and see in the kernel that they are."""
        asked_N = np.rint(bits_per_s_N)
        lines = [self._class(n, int(rate)) for n, rate in enumerate(asked_N)]
        device = f"dev {self._interface.name}"
        show = [f"class show {device}", f"qdisc show {device}"]
        said = self._tc.run([*before, *lines, *after, *show], until=f"qdisc htb {HANDLE} root")
        found = {int(minor, 16): float(number) * UNIT[unit] for minor, number, unit in CLASS.findall(said)}
        found_N = [found[minor] for minor in sorted(found)]
        # tc prints four digits, and the kernel keeps whole bytes
        if len(found_N) != len(asked_N) or not np.allclose(found_N, asked_N, rtol=1e-3, atol=8):
            raise ConfigError(
                f"rate shaping: {self._interface.name} has classes of {found_N} instead of {asked_N.tolist()} bit/s: "
                "look for another program that changes them"
            )
        self._bits_per_s_N = bits_per_s_N

    def _class(self, n: int, bits_per_s: int) -> str:
        burst_bytes = FRAME_BYTES + round(bits_per_s / 8 * TIMER_LATE_S)
        rate = f"rate {bits_per_s}bit ceil {bits_per_s}bit burst {burst_bytes} cburst {burst_bytes}"
        place = f"dev {self._interface.name} parent {HANDLE} classid {HANDLE}{n + 1:x}"
        return f"class replace {place} htb {rate} quantum {FRAME_BYTES}"

    def _filters(self, addresses: Sequence[str]) -> list[str]:
        every = f"filter add dev {self._interface.name} parent {HANDLE} protocol ip prio 1 u32 match ip dst"
        return [f"{every} {address}/32 flowid {HANDLE}{n + 1:x}" for n, address in enumerate(addresses)]


class DownlinkShaper(_Shaper):
    """Rates of a base station towards its devices, as shares of `total_bits_per_s`; at first even.

    address_of: IPv4 address of each device, all reached by `interface`. Use as a context manager, or call `close`.
    """

    def __init__(self, interface: str, address_of: Mapping[str, str], total_bits_per_s: float) -> None:
        """Raises ConfigError, in one line, for what is wrong in the arguments, the machine or the interface."""
        if not address_of:
            raise ConfigError("rate shaping: no device has an address: name them, or start without rate shaping")
        self._total_bits_per_s = total_bits_per_s
        even_N = np.full(len(address_of), total_bits_per_s / len(address_of))
        _require_rates(list(address_of), even_N)
        super().__init__(interface, address_of, even_N)

    def __enter__(self) -> DownlinkShaper:
        return self

    def set_rates(self, bits_per_s_N: ArrayLike) -> None:
        """Put a rate per device in force, in the order of `address_of`. 0, a device without rows, keeps its rate.

        What still travels to such a device, an echo for its clock, is not of this block and must not wait for the
        next. Raises ConfigError for any other rate below 1 kbit/s, a sum above the total, and where tc fails.
        """
        asked_N = np.asarray(bits_per_s_N, np.float64)
        if asked_N.shape != self._bits_per_s_N.shape:
            raise ConfigError(f"rate shaping: {asked_N.size} rates for {len(self._devices)} devices: give one for each")
        if asked_N.sum() > self._total_bits_per_s * 1.001:
            total = f"the total of {self._total_bits_per_s:g}"
            raise ConfigError(f"rate shaping: {asked_N.sum():g} bit/s asked in all, above {total}: give shares of it")
        rates_N = np.where(asked_N == 0, self._bits_per_s_N, asked_N)
        _require_rates(self._devices, rates_N)
        self._set(rates_N)


class UplinkShaper(_Shaper):
    """The rate of a node towards its base station, not limited at first.

    station_address: IPv4, reached by `interface`. Use as a context manager, or call `close`.
    """

    def __init__(self, interface: str, station_address: str) -> None:
        """Raises ConfigError, in one line, for what is wrong in the arguments, the machine or the interface."""
        super().__init__(interface, {"the base station": station_address}, np.array([HIGHEST_BITS_PER_S]))

    def __enter__(self) -> UplinkShaper:
        return self

    def set_rate(self, bits_per_s: float) -> None:
        """Put a rate in force. Raises ConfigError below 1 kbit/s, above 100 Gbit/s, and where tc fails."""
        rate_N = np.array([bits_per_s], np.float64)
        _require_rates(self._devices, rate_N)
        self._set(rate_N)

    def lift(self) -> None:
        """Limit nothing until the next rate."""
        self.set_rate(HIGHEST_BITS_PER_S)


def _checked_addresses(address_of: Mapping[str, str]) -> list[str]:
    owner: dict[str, str] = {}
    for device, text in address_of.items():
        try:
            address = str(ipaddress.IPv4Address(text))
        except ValueError:
            said = f"{text!r} is not an IPv4 address" if text else "no address is given"
            raise ConfigError(f"rate shaping: {device}: {said}: give the one it is reached at, as 10.0.0.2") from None
        if address in owner:
            raise ConfigError(f"rate shaping: {owner[address]} and {device} are both at {address}: give each its own")
        owner[address] = device
    return list(owner)


def _require_rates(devices: Sequence[str], bits_per_s_N: NDArray[np.float64]) -> None:
    for device, rate in zip(devices, bits_per_s_N, strict=True):
        if not LOWEST_BITS_PER_S <= rate <= HIGHEST_BITS_PER_S:
            need = f"it must be from {LOWEST_BITS_PER_S:g} to {HIGHEST_BITS_PER_S:g}"
            raise ConfigError(f"rate shaping: the rate of {device} is {rate:g} bit/s: {need}")
