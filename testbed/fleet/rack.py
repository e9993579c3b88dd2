"""A virtual rack: devices that boot a real systemd and answer a real ssh on a bridge of this machine.

Virtual is not measured: the devices share this machine's kernel, clock and cores, no Jetson is in them, and their CUDA
is missing. Everything carries the rack's name, so that `Rack.down` finds it also where `Rack.up` was killed half-way.
Root of a device is root of this machine: run code in it that you trust.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from testbed.errors import ConfigError
from testbed.fleet.rack_device import LOOK_EVERY_S, Layers, RackDevice
from testbed.fleet.rack_inventory import OWN_MARK, inventory_text, write_inventory
from testbed.fleet.rack_network import RackNetwork, bridge_exists, choose_subnet, forwarding, remove_network
from testbed.fleet.rack_plan import RackPlan, refuse_foreign, require_sense
from testbed.fleet.rack_root import (
    BASES,
    COMPILED,
    base_root,
    compiled_loops,
    own_sources,
    runtime_layer,
    wheelhouse,
)
from testbed.fleet.rack_skin import write_skin
from testbed.fleet.rack_system import DeviceCgroup, mounted_below, overlays, remove_tree, require_means, tool
from testbed.paths import runtime_directory, state_directory

NAME = re.compile(r"[a-z][a-z0-9]{0,6}")
UNMOUNTED_WITHIN_S = 2.0
Say = Callable[[str], None]


class Rack:
    """One rack of this machine, known by its name. Everything needs root (`require_means`)."""

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--name {name}: small letters and digits, at most 7, a letter first")
        self.name = name
        self.folder = state_directory() / "racks" / name
        self._plan_file = self.folder / "rack.json"

    @property
    def plan(self) -> RackPlan | None:
        return RackPlan.read(self._plan_file)

    @property
    def default_inventory(self) -> Path:
        return self.folder / "inventory.yml"

    def devices(self) -> list[RackDevice]:
        """Raises ConfigError where the rack is not up."""
        plan = self.plan
        if plan is None or not bridge_exists(self.name):
            raise ConfigError(f"rack {self.name}: is not up: testbed rack up --nodes 4")
        return self._devices(plan)

    def device(self, name: str) -> RackDevice:
        devices = {device.name: device for device in self.devices()}
        if name not in devices:
            raise ConfigError(f"rack {self.name}: no device {name}; there are {', '.join(devices)}")
        return devices[name]

    def _devices(self, plan: RackPlan) -> list[RackDevice]:
        network = RackNetwork(self.name, plan.subnet)
        return [RackDevice(name, n, network, self.folder / "devices" / name) for n, name in enumerate(plan.devices)]

    def up(
        self,
        nodes: int,
        say: Say,
        *,
        base: str = "debian",
        bare: bool = False,
        rate_mbit_per_s: float | None = None,
        internet: bool = False,
        subnet: str | None = None,
        inventory: Path | None = None,
        mirror: str | None = None,
        keyring: Path | None = None,
    ) -> RackPlan:
        """Boot `nodes` devices and write their inventory; all answer ssh on return. Of all else nothing stays.

        `say` hears what is being done. Raises ConfigError for what a user can mend.
        """
        require_means()
        require_sense(nodes, rate_mbit_per_s, base)
        with self._alone():
            if inventory is not None:
                refuse_foreign(inventory)
            self._refuse_or_clean(say)
            inventory = (inventory or self.default_inventory).absolute()
            chosen = choose_subnet(subnet)
            say("looking for the root of all devices")
            layers = _layers(base, bare, say, mirror, keyring)
            names = tuple(f"jetson-{n}" for n in range(nodes))
            plan = RackPlan(names, chosen, base, bare, rate_mbit_per_s, internet, str(inventory))
            try:
                return self._make(plan, layers, say)
            except BaseException:
                self._remove(say)
                raise

    def _make(self, plan: RackPlan, layers: Layers, say: Say) -> RackPlan:
        self.folder.mkdir(mode=0o700, parents=True)
        self._write(plan)
        skin, bound = write_skin(self.folder / "skin")
        layers = Layers((skin, *layers.folders), (*layers.arguments, *bound))
        (self.folder / "boot.json").write_text(json.dumps(layers.arguments))
        network = RackNetwork(self.name, plan.subnet)
        say(f"network {plan.subnet}")
        network.make(len(plan.devices))
        if plan.internet:
            plan = self._write(plan, forwarding_before=forwarding())
            network.open_way_out()
        key = self._make_key()
        devices = self._devices(plan)
        hosts = f"{network.station_address} base-station\n"
        hosts += "".join(f"{device.address} {device.name}\n" for device in devices)

        def start(device: RackDevice) -> str:
            say(f"{device.name}: boots")
            host_key = device.make(layers, key, hosts)
            if plan.rate_mbit_per_s is not None:
                network.limit(device.n, plan.rate_mbit_per_s * 1e6)
            device.boot(layers.arguments)
            device.wait_for_ssh()
            say(f"{device.name}: answers ssh at {device.address}")
            return f"{device.address} {' '.join(host_key.split()[:2])}\n"

        with ThreadPoolExecutor(len(devices)) as pool:
            known = list(pool.map(start, devices))
        (self.folder / "ssh" / "known_hosts").write_text("".join(known))
        write_inventory(Path(plan.inventory), inventory_text(self, network, devices, plan))
        return self._write(plan, up=True)

    def _make_key(self) -> str:
        folder = self.folder / "ssh"
        folder.mkdir(mode=0o700)
        tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"rack-{self.name}", "-f", folder / "id_ed25519")
        return (folder / "id_ed25519.pub").read_text()

    def _write(self, plan: RackPlan, **changes: Any) -> RackPlan:
        """Before what it says is made, so that whoever cleans up knows."""
        changed = RackPlan(**{**asdict(plan), **changes})
        partial = self._plan_file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(changed)))
        partial.replace(self._plan_file)
        return changed

    def _refuse_or_clean(self, say: Say) -> None:
        plan = self.plan
        if plan is not None and plan.up and bridge_exists(self.name):
            raise ConfigError(f"rack {self.name}: is up already: testbed rack down, or give this one another --name")
        if bridge_exists(self.name) and plan is None:
            raise ConfigError(f"rack {self.name}: another user has one of that name up: give this one another --name")
        self._remove(say)

    def boot_arguments(self) -> tuple[str, ...]:
        return tuple(json.loads((self.folder / "boot.json").read_text()))

    def down(self, say: Say) -> bool:
        """Remove all of it, whatever state it is in. Returns whether anything was there."""
        require_means()
        with self._alone():
            there = self.folder.exists() or bridge_exists(self.name)
            self._remove(say)
        return there

    def _remove(self, say: Say) -> None:
        plan, prefix = self.plan, f"wdmoe-{self.name}-"
        groups = DeviceCgroup.named(prefix)
        for group in groups:
            say(f"ending {group.name.removeprefix('wdmoe-')}")
            group.remove()
        for point in overlays(f"wd-{self.name}-"):
            tool("umount", "--recursive", point)
        remove_network(self.name, None if plan is None else plan.forwarding_before)
        if plan is not None:
            with suppress(OSError, UnicodeDecodeError):
                if Path(plan.inventory).read_text().startswith(OWN_MARK):
                    Path(plan.inventory).unlink()
        gone_by_s = time.monotonic() + UNMOUNTED_WITHIN_S
        while mounted_below(self.folder) and time.monotonic() < gone_by_s:
            time.sleep(LOOK_EVERY_S)  # a namespace that has just ended may hold one a moment longer
        remove_tree(self.folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One `up` or `down` of a rack at a time. Raises ConfigError at once where another is at work."""
        with (runtime_directory() / f"rack-{self.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"rack {self.name}: another testbed rack is at work on it: wait for it") from None
            yield


def _layers(base: str, bare: bool, say: Say, mirror: str | None, keyring: Path | None) -> Layers:
    root = base_root(BASES[base], say, mirror, keyring)
    if bare:
        return Layers((root,), ())
    layer = runtime_layer(BASES[base], root, wheelhouse(BASES[base], say), say)
    arguments = [f"--bind-ro={where}:{seen}" for where, seen in own_sources().items()]
    return Layers((layer, root), (*arguments, f"--bind={compiled_loops(layer)}:{COMPILED}"))


def status(devices: Sequence[RackDevice]) -> list[dict[str, Any]]:
    """Of each device: name, address, power (on, off, frozen), link (up, cut), and whether ssh answers."""

    def of(device: RackDevice) -> dict[str, Any]:
        power, link = device.power, "up" if device.link_up else "cut"
        answers = power == "on" and link == "up" and device.answers_ssh()
        return {"device": device.name, "address": device.address, "power": power, "link": link, "ssh": answers}

    with ThreadPoolExecutor(max(1, len(devices))) as pool:
        return list(pool.map(of, devices))
