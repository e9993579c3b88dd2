"""NVIDIA boards on this host's USB, out of /sys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from firmware_setup.flash.boards import RECOVERY, RUNNING, VENDOR
from firmware_setup.machine import Machine

DEVICES = "/sys/bus/usb/devices"


@dataclass(frozen=True)
class UsbBoard:
    place: str  # 3-2: the host's bus and port
    product: str  # 7523
    state: str  # recovery, running, or unknown: an id not in the table
    module: str


def find_boards(machine: Machine) -> list[UsbBoard]:
    found = []
    for place in machine.names(DEVICES):
        if machine.text(f"{DEVICES}/{place}/idVendor", 16).strip().lower() != VENDOR:
            continue
        product = machine.text(f"{DEVICES}/{place}/idProduct", 16).strip().lower()
        if re.fullmatch("[0-9a-f]{4}", product):
            found.append(board_of(place, product))
    return found


def board_of(place: str, product: str) -> UsbBoard:
    if product in RECOVERY:
        return UsbBoard(place, product, "recovery", RECOVERY[product])
    if product == RUNNING:
        return UsbBoard(place, product, "running", "unknown")
    return UsbBoard(place, product, "unknown", "unknown")
