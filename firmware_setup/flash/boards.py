"""Boards by their USB ids in recovery mode, and which command flashes which of them with which release.

Commands are those of NVIDIA's documentation of each release; where it gives none for a pair, none is made up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from firmware_setup.l4t import major_of

VENDOR = "0955"
RUNNING = "7020"  # Linux is up, and this is its USB network
RECOVERY = {
    "7023": "Jetson AGX Orin developer kit or 64GB",
    "7223": "Jetson AGX Orin 32GB",
    "7323": "Jetson Orin NX 16GB",
    "7423": "Jetson Orin NX 8GB",
    "7523": "Jetson Orin Nano 8GB",
    "7623": "Jetson Orin Nano 4GB",
    "7026": "Jetson AGX Thor developer kit (T5000)",
    "7226": "Jetson T4000",
    "7019": "Jetson AGX Xavier",
    "7e19": "Jetson Xavier NX",
}
NVME_T234 = ("--external-device", "nvme0n1p1", "-c", "tools/kernel_flash/flash_l4t_t234_nvme.xml")
INITRD = "./tools/kernel_flash/l4t_initrd_flash.sh"
RELEASE = re.compile("[0-9]{1,4}([.][0-9]{1,4}){1,2}")
SHOWN = ("--showlogs", "--network", "usb0")


class RefusedError(Exception):
    """What must not be flashed, in one line."""


@dataclass(frozen=True)
class Target:
    """What is flashed the same way. Its name is what the user types to confirm."""

    name: str
    products: tuple[str, ...]  # USB ids in recovery mode
    conf: str  # of the developer kit, as NVIDIA's tools name it
    storages: tuple[str, ...]  # the first is the default
    has_super: bool
    majors: tuple[int, ...]  # releases whose command is known


TARGETS = {
    target.name: target
    for target in (
        Target("orin-nano", ("7523", "7623"), "jetson-orin-nano-devkit", ("nvme",), True, (36,)),
        Target("orin-nx", ("7323", "7423"), "jetson-orin-nano-devkit", ("nvme",), True, (36,)),
        Target("agx-orin", ("7023", "7223"), "jetson-agx-orin-devkit", ("emmc", "nvme"), False, (36,)),
        Target("agx-thor", ("7026",), "jetson-agx-thor-devkit", ("nvme",), False, (38, 39)),
    )
}


def flash_command(target: Target, release: str, storage: str, conf: str) -> list[str]:
    """The words of the command, run in the BSP's folder. Raises RefusedError where none is known."""
    _check_release(target, release)
    if storage not in target.storages:
        raise RefusedError(
            f"{target.name}: --storage {storage} is not known for it; use {' or '.join(target.storages)}"
        )
    if target.name == "agx-thor":
        return ["sudo", "./l4t_initrd_flash.sh", conf, "internal"]
    if storage == "emmc":
        return ["sudo", "./flash.sh", conf, "internal"]
    if target.name == "agx-orin":
        return ["sudo", INITRD, *NVME_T234, *SHOWN, conf, "external"]
    return ["sudo", INITRD, *NVME_T234, "-p", "-c bootloader/generic/cfg/flash_t234_qspi.xml", *SHOWN, conf, "internal"]


def conf_of(target: Target, super_mode: bool) -> str:
    if super_mode and not target.has_super:
        raise RefusedError(f"{target.name} has no super mode; leave --super away")
    return f"{target.conf}-super" if super_mode else target.conf


def _check_release(target: Target, release: str) -> None:
    major = major_of(release)
    if not RELEASE.fullmatch(release):
        raise RefusedError(f"--release {release!r} is no L4T; write it like 36.4.3")
    if major in target.majors:
        return
    if major is not None and major <= 35:
        raise RefusedError(f"L4T {release} is not supported: Python 3.8 or older; flash 36.x or newer")
    if major == 38:
        raise RefusedError(f"L4T {release} is for Thor only; flash {target.name} with 36.x")
    raise RefusedError(
        f"no command is known here that flashes {target.name} with L4T {release}; "
        f"known: {', '.join(f'{known}.x' for known in target.majors)}; otherwise use NVIDIA's SDK Manager or ISO"
    )
