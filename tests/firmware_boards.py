"""Samples of boards, and boards written by hand (synthetic) that the checks of `firmware_setup` can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firmware_setup.machine import Answer, Commands

FOLDER = Path(__file__).parent / "fixtures/firmware"
LINK = "Connected to 02:00:00:00:00:02 (on wlP1p1s0)\n\tfreq: 5180\n\tsignal: -47 dBm\n"
TRACKING = "C0000209,192.0.2.9,3,1.0,0.0004,0.0,0.0,0.0,0.0,0.0,0.002,0.0003,64.2,Normal\n"
PROBED = {
    "python": "3.10.12", "torch": "2.8.0", "built_for_cuda": "12.6", "available": True, "device": "Orin",
    "capability": "8.7", "products_right": True, "numpy_bridge": True,
}  # fmt: skip


def samples(file: str, topic: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / file).read_text())[topic]
    assert all(sample["kind"] in ("captured", "abridged", "reported", "synthetic") for sample in found)
    return found


class Spoken(Commands):
    """Commands that say what is written here: by the whole command line, or by its first word."""

    def __init__(self, said: Mapping[str, str | Answer]) -> None:
        super().__init__()
        self.said = said
        self.asked: list[str] = []

    def run(self, name: str, *arguments: str, timeout_s: float | None = None) -> Answer:  # noqa: ARG002 - nobody waits
        line = " ".join((name, *arguments))
        self.asked.append(line)
        answer = self.said.get(line, self.said.get(name, Answer(None, f"{name} is not installed")))
        return Answer(0, answer) if isinstance(answer, str) else answer


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def orin_nano(root: Path) -> Path:
    """A healthy Orin Nano 8GB with JetPack 6.2 (synthetic, of the samples), as far as files go."""
    tree = samples("device_trees.json", "compatible")[1]
    write(
        root,
        {
            "proc/device-tree/model": tree["model"],
            "proc/device-tree/compatible": tree["sample"],
            "etc/nv_tegra_release": samples("releases.json", "nv_tegra_release")[4]["sample"],
            "etc/nvpmodel/super.conf": (FOLDER / "power_modes/orin_nano_8gb_super.conf").read_text(),
            "proc/meminfo": "MemTotal:        7802880 kB\nMemAvailable:    6000000 kB\nSwapTotal:       3901440 kB\n",
            "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
            "sys/class/net/wlP1p1s0/phy80211/name": "phy0\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "49468\n",
            "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
            "sys/class/thermal/cooling_device0/cur_state": "0\n",
        },
    )
    (root / "etc/nvpmodel.conf").symlink_to("/etc/nvpmodel/super.conf")  # absolute, as on a board
    return root


def orin_nano_says(python: str, **changed: str | Answer) -> dict[str, str | Answer]:
    """What the commands of that board answer; `iw_save` and the like change one of them."""
    said: dict[str, str | Answer] = {
        "dpkg-query --show nvidia-l4t-core": "nvidia-l4t-core\t36.4.3-20250107174145\n",
        "dpkg-query --show nvidia-jetpack": "nvidia-jetpack\t6.2+b77\n",
        "nvpmodel -q": "NV Power Mode: 25W\n1\n",
        "jetson_clocks --show": "cpu0:  Online=1 MinFreq=1344000 MaxFreq=1344000 CurrentFreq=1344000\n"
        "GPU MinFreq=918000000 MaxFreq=918000000 CurrentFreq=918000000\n",
        "iw dev": samples("network.json", "iw_dev")[0]["sample"],
        "iw dev wlP1p1s0 link": LINK,
        "iw dev wlP1p1s0 get power_save": "Power save: off\n",
        "ip route get 192.0.2.9": "192.0.2.9 dev wlP1p1s0 src 192.0.2.20 uid 0 \n    cache \n",
        "chronyc -c tracking": TRACKING,
        python: json.dumps(PROBED) + "\n",
    }
    lines = {"nvpmodel": "nvpmodel -q", "clocks": "jetson_clocks --show", "iw_link": "iw dev wlP1p1s0 link",
             "iw_save": "iw dev wlP1p1s0 get power_save", "route": "ip route get 192.0.2.9",
             "chrony": "chronyc -c tracking", "core": "dpkg-query --show nvidia-l4t-core", "probe": python}  # fmt: skip
    return {**said, **{lines[name]: answer for name, answer in changed.items()}}
