"""Which board this is, and which L4T and JetPack it runs. What is not known is "unknown", never a guess."""

from __future__ import annotations

import re
from dataclasses import dataclass

from firmware_setup.machine import Machine, clean

UNKNOWN = "unknown"
DEVICE_TREES = ("/proc/device-tree", "/sys/firmware/devicetree/base")  # a container may have the second only
# L4T -> JetPack as NVIDIA released them; jetson-stats 7.2.2 has the same.
JETPACK_OF_L4T = {
    "39.2.2": "7.2.2", "39.2.1": "7.2.1", "39.2.0": "7.2", "39.0.0": "7.2 EA",
    "38.4.0": "7.1", "38.2.2": "7.0", "38.2.1": "7.0", "38.2.0": "7.0",
    "36.5.2": "6.2.3", "36.5.0": "6.2.2", "36.4.7": "6.2.1", "36.4.4": "6.2.1", "36.4.3": "6.2", "36.4.2": "6.1 rev1",
    "36.4.0": "6.1", "36.3.0": "6.0", "36.2.0": "6.0 DP",
    "35.6.5": "5.1.7", "35.6.4": "5.1.6", "35.6.3": "5.1.5", "35.6.2": "5.1.5", "35.6.1": "5.1.5", "35.6.0": "5.1.4",
    "35.5.0": "5.1.3", "35.4.1": "5.1.2", "35.3.1": "5.1.1", "35.2.1": "5.1", "35.1.0": "5.0.2",
    "32.7.6": "4.6.6", "32.7.5": "4.6.5", "32.7.4": "4.6.4", "32.7.3": "4.6.3", "32.7.2": "4.6.2", "32.7.1": "4.6.1",
}  # fmt: skip
MODULES = {
    "p3834-0008": "Jetson T5000 (AGX Thor developer kit)",
    "p3834-0000": "Jetson T4000",
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano 8GB (developer kit)",
    "p3701-0000": "Jetson AGX Orin (developer kit)",
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3701-0008": "Jetson AGX Orin Industrial",
}
OLDER_MODULES = {  # by the part alone: no node runs on them, so their variants do not matter
    "p3668": "Jetson Xavier NX",
    "p2888": "Jetson AGX Xavier",
    "p3448": "Jetson Nano",
    "p3310": "Jetson TX2",
}
RELEASE_LINE = re.compile(r"^# R([0-9]{1,4}) \(release\), REVISION: ([0-9]{1,4})\.([0-9]{1,4})", re.MULTILINE)
PACKAGE_LINE = re.compile(r"^(?P<name>[a-z0-9.+-]{1,80})\t(?P<version>[A-Za-z0-9.+:~-]{1,80})$", re.MULTILINE)
CORE_VERSION = re.compile(r"([0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4})-")
PART = re.compile(r"p[0-9]{4}-[0-9]{4}")


@dataclass(frozen=True)
class Board:
    """A board as its device tree names it. `part` and `carrier` identify it; carrier vendors change `model`."""

    model: str
    module: str
    part: str  # p3767-0005
    carrier: str  # p3768-0000
    soc: str  # tegra234
    super_mode: bool | None  # flashed as -super: without it MAXN_SUPER is not there. None: not a module that has it


@dataclass(frozen=True)
class Software:
    l4t: str  # 36.4.3
    l4t_source: str  # dpkg, nv_tegra_release, or unknown
    jetpack: str  # 6.2
    jetpack_package: str | None  # 6.2+b77; None: the metapackage is not installed, so CUDA may be missing
    kernel: str
    python: str | None  # of the interpreter a node would run on; None: not asked


def read_board(machine: Machine) -> Board:
    tree = next((folder for folder in DEVICE_TREES if machine.exists(f"{folder}/compatible")), DEVICE_TREES[0])
    model = _strings(machine.read(f"{tree}/model"))
    return board_of(
        model[0] if model else UNKNOWN,
        _strings(machine.read(f"{tree}/compatible")),
        machine.text("/etc/nv_boot_control.conf"),
    )


def board_of(model: str, compatible: list[str], boot_control: str = "") -> Board:
    """The board of a device tree's `model` and `compatible` strings and of /etc/nv_boot_control.conf."""
    names = [name[len("nvidia,") :] for name in compatible if name.startswith("nvidia,")]
    part = next((match.group() for name in names if (match := PART.match(name)) and "+" not in name), UNKNOWN)
    pairs = [name.split("+") for name in names if "+" in name]
    carrier = next((match.group() for pair in pairs if (match := PART.match(pair[0]))), UNKNOWN)
    if part == UNKNOWN:  # AGX Orin names its module together with its carrier only
        part = next((match.group() for pair in pairs if (match := PART.match(pair[-1]))), UNKNOWN)
    soc = next((name for name in names if re.fullmatch("tegra[0-9]{3}", name)), UNKNOWN)
    has_super = part.startswith("p3767-")
    is_super = any(name.endswith("-super") for name in names) or "-super" in _tnspec(boot_control)
    module = MODULES.get(part) or OLDER_MODULES.get(part.split("-")[0], UNKNOWN)
    return Board(model, module, part, carrier, soc, is_super if has_super else None)


def read_software(machine: Machine, python: str | None = None) -> Software:
    packages = package_versions(
        machine.run("dpkg-query", "--show", "nvidia-l4t-core").text
        + "\n"
        + machine.run("dpkg-query", "--show", "nvidia-jetpack").text
    )
    core = CORE_VERSION.match(packages.get("nvidia-l4t-core", ""))
    of_file = release_of(machine.text("/etc/nv_tegra_release"))
    l4t, source = (core.group(1), "dpkg") if core else (of_file, "nv_tegra_release" if of_file != UNKNOWN else UNKNOWN)
    return Software(
        l4t=l4t,
        l4t_source=source,
        jetpack=jetpack_of(l4t),
        jetpack_package=packages.get("nvidia-jetpack"),
        kernel=machine.text("/proc/sys/kernel/osrelease", 256).strip() or UNKNOWN,
        python=python,
    )


def release_of(nv_tegra_release: str) -> str:
    """36.4.3 of `# R36 (release), REVISION: 4.3, ...`; the date is not read, it has no one form."""
    match = RELEASE_LINE.search(nv_tegra_release)
    return ".".join(str(int(field)) for field in match.groups()) if match else UNKNOWN


def jetpack_of(l4t: str) -> str:
    return JETPACK_OF_L4T.get(l4t, UNKNOWN)


def package_versions(dpkg_query: str) -> dict[str, str]:
    """Name to version of what `dpkg-query --show` lists; its complaints are passed over."""
    return {match["name"]: match["version"] for match in PACKAGE_LINE.finditer(dpkg_query)}


def major_of(l4t: str) -> int | None:
    head = l4t.split(".", maxsplit=1)[0]
    return int(head) if re.fullmatch("[0-9]{1,4}", head) else None


def _tnspec(boot_control: str) -> str:
    """`TNSPEC 3767-302-0005-J.1-1-0-jetson-orin-nano-devkit-super-`."""
    return next((line for line in boot_control.splitlines() if line.startswith("TNSPEC")), "")


def _strings(raw: bytes | None) -> list[str]:
    lines = (" ".join(clean(part).split()) for part in (raw or b"").split(b"\0")[:16])
    return [line for line in lines if line]
