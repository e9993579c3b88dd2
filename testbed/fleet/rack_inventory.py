"""The Ansible inventory of a virtual rack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import ConfigError
from testbed.fleet.rack_device import RackDevice
from testbed.fleet.rack_network import RackNetwork
from testbed.fleet.rack_root import USER, VENV

if TYPE_CHECKING:
    from testbed.fleet.rack import Rack
    from testbed.fleet.rack_plan import RackPlan

OWN_MARK = "# Written by `testbed rack up`"
STATION_PORT = 5555
TEXT = """\
{mark}: virtual boards, which are no Jetsons. `testbed rack down` removes them and this file.
all:
  vars:
    ansible_user: {user}
    ansible_ssh_private_key_file: "{ssh}/id_ed25519"
    ansible_ssh_common_args: >-
      -o UserKnownHostsFile={ssh}/known_hosts -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes
    ansible_python_interpreter: /usr/bin/python3
    wdmoe_bs_address: {station}
    wdmoe_bs_port: {port}
    wdmoe_virtual: true
    wdmoe_links: {links}
{environment}  children:
    jetsons:
      hosts:
{hosts}"""


def links(rate_mbit_per_s: float | None) -> str:
    """What a virtual rack's links are, in words."""
    if rate_mbit_per_s is None:
        return "between containers of one machine (virtual boards), as they are"
    rate = f"{rate_mbit_per_s:g} Mbit/s each way"
    return f"emulated by the kernel between containers of one machine (virtual boards), {rate}"


def inventory_text(rack: Rack, network: RackNetwork, devices: Sequence[RackDevice], plan: RackPlan) -> str:
    """Devices are the hosts of the group `jetsons`; what both sides must know of the base station stands in `vars`."""
    return TEXT.format(
        mark=OWN_MARK,
        user=USER,
        ssh=rack.folder / "ssh",
        station=network.station_address,
        port=STATION_PORT,
        links=links(plan.rate_mbit_per_s),
        environment="" if plan.bare else f"    wdmoe_python: {VENV}/bin/python\n",
        hosts="".join(f"        {d.name}:\n          ansible_host: {d.address}\n" for d in devices),
    )


def write_inventory(file: Path, text: str) -> None:
    """Raises ConfigError where it cannot be written."""
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"--inventory {file}: {error.strerror}: name another file") from None
