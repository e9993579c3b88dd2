"""An Ansible inventory is read as Ansible reads it, or refused in one line."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("yaml")

from testbed.config import load_run_file
from testbed.errors import ConfigError
from testbed.fleet.inventory import Inventory, read_inventory
from testbed.fleet.on_inventory import left_out, load_on_inventory
from testbed.fleet.remote import ssh_command

LAB = """
all:
  vars:
    ansible_user: nvidia
    wdmoe_bs_address: 10.0.0.1
    wdmoe_bs_port: 6000
    wdmoe_keys: /etc/wdmoe/keys
    wdmoe_links: 802.11ac, 80 MHz
    secret: !vault |
      $ANSIBLE_VAULT;1.1;AES256
  children:
    jetsons:
      vars:
        wdmoe_python: /opt/wdmoe/bin/python
      hosts:
        orin-0:
          ansible_host: 10.0.0.2
        orin-1:
          ansible_host: 10.0.0.3
          ansible_port: 2222
          ansible_user: somebody
          ansible_ssh_private_key_file: /keys/one
          ansible_ssh_common_args: "-o ProxyJump=gate -o 'User Known'"
    base_station:
      hosts:
        bs:
          ansible_connection: local
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "lab.yml"
    file.write_text(text)
    return file


def read(folder: Path, text: str) -> Inventory:
    return read_inventory(written(folder, text))


def test_devices_are_the_hosts_of_the_group_with_what_is_said_nearest_to_each(tmp_path: Path) -> None:
    inventory = read(tmp_path, LAB)
    first, second = inventory.boards
    assert (first.name, first.address, first.user, first.port) == ("orin-0", "10.0.0.2", "nvidia", None)
    assert (second.user, second.port, second.key) == ("somebody", 2222, Path("/keys/one"))
    assert first.python == "/opt/wdmoe/bin/python"
    assert inventory.links == "802.11ac, 80 MHz"
    assert (first.unit, first.virtual) == ("wdmoe-node.service", False)
    assert (inventory.bs_address, inventory.bs_port, inventory.keys) == ("10.0.0.1", 6000, Path("/etc/wdmoe/keys"))


def test_variables_beside_the_file_hold_where_the_file_says_nothing_nearer(tmp_path: Path) -> None:
    for name, text in {
        "group_vars/jetsons.yml": "ansible_user: of-group\n",
        "host_vars/orin-0.yaml": "ansible_port: 7\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    first, second = read(tmp_path, LAB).boards
    assert (first.user, first.port) == ("of-group", 7)
    assert (second.user, second.port) == ("somebody", 2222)


def test_without_the_group_every_host_but_the_base_station_is_a_device(tmp_path: Path) -> None:
    text = "lab:\n  hosts:\n    a: {ansible_host: 10.0.0.2}\n    b:\nbase_station:\n  hosts:\n    bs:\n"
    assert [(board.name, board.address) for board in read(tmp_path, text).boards] == [("a", "10.0.0.2"), ("b", "b")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("all: [1]", "group all must be a table"),
        ("just words", "must be a table"),
        ("all: {hosts: {a: {}", "not valid YAML"),
        ("all: {host: {a: }}", "unknown key 'host'"),
        ("all: {hosts: {'a[0:3]': }}", "write every host out"),
        ("all: {hosts: {A_1: }}", "small letters"),
        ("all: {hosts: }", "names no device"),
        ("all: {hosts: {a: {ansible_host: '{{ x }}'}}}", "template"),
        ("all: {hosts: {a: {ansible_host: '-oProxyCommand=x'}}}", "no name or address"),
        ("all: {hosts: {a: {ansible_user: '-l root'}}}", "no name or address"),
        ("all: {hosts: {a: {ansible_port: 70000}}}", "must be a port"),
        ("all: {hosts: {a: {wdmoe_unit: 'x; reboot'}}}", "letters, digits"),
        ("all: {hosts: {a: {ansible_ssh_common_args: '-o \"x'}}}", "mend the quotes"),
        ("all: {hosts: !!python/object/apply:os.system ['true']}", "not valid YAML"),
        ("a: &a [x]\nall: {vars: {x: [" + "*a, " * 1001 + "]}}", "too many aliases"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_that_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, text)
    assert said in str(told.value)
    assert str(tmp_path / "lab.yml") in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_that_is_missing_or_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name an inventory"):
        read_inventory(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="larger than"):
        read(tmp_path, "#" * (2**20 + 1))


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_no_content_whatever_is_more_than_a_told_mistake(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lab.yml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        with suppress(ConfigError):
            assert read_inventory(file).boards


def test_the_base_stations_address_must_be_the_same_for_all(tmp_path: Path) -> None:
    inventory = read(tmp_path, "all: {hosts: {a: {wdmoe_bs_address: 10.0.0.1}, b: }}")
    with pytest.raises(ConfigError, match="wdmoe_bs_address"):
        _ = inventory.bs_address


def test_a_device_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    inventory = read(tmp_path, LAB)
    assert [board.name for board in inventory.chosen(["orin-1"])] == ["orin-1"]
    with pytest.raises(ConfigError, match="no device orin-7; there are orin-0, orin-1"):
        inventory.chosen(["orin-7"])


def test_ssh_asks_no_question_and_ends_its_options_before_the_host(tmp_path: Path) -> None:
    command = ssh_command(read(tmp_path, LAB).boards[1])
    assert "BatchMode=yes" in command
    assert command[-2:] == ["--", "somebody@10.0.0.3"]
    assert command[command.index("-p") + 1] == "2222"
    assert "User Known" in command


RUN = """
name = "lab"
[radio]
carrier_ghz = 3.5
bandwidth_hz = 1e8
station_power_w = 10.0
device_power_w = 0.2
noise_figure_db = 7.0
fading = "none"
medium = "fdd"
[emulation]
dilation = 5.0
[[device]]
name = "orin-1"
emulated_flops_per_s = 1e9
distance_m = 5.0
joule_per_flop = 1e-12
[[policy]]
name = "topk"
"""


def test_a_run_file_on_an_inventory_has_its_devices_and_nothing_emulated(tmp_path: Path) -> None:
    inventory, run_file = read(tmp_path, LAB), tmp_path / "run.toml"
    run_file.write_text(RUN)
    config = load_on_inventory(run_file, ["workload.score_prompts=3"], inventory)
    assert [(device.name, device.address) for device in config.devices] == [
        ("orin-0", "10.0.0.2"),
        ("orin-1", "10.0.0.3"),
    ]
    assert [device.emulated_flops_per_s for device in config.devices] == [None, None]
    assert [device.joule_per_flop for device in config.devices] == [None, 1e-12]
    assert (config.radio, config.fleet.start, config.fleet.keys) == (None, "none", Path("/etc/wdmoe/keys"))
    assert (config.listen.host, config.listen.port, config.workload.score_prompts) == ("10.0.0.1", 6000, 3)
    assert left_out(run_file) == ["[radio]", "[emulation]"]
    assert load_run_file(run_file).radio is not None


def test_a_run_without_lasting_keys_says_how_to_make_them(tmp_path: Path) -> None:
    inventory = read(tmp_path, LAB.replace("    wdmoe_keys: /etc/wdmoe/keys\n", ""))
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN)
    with pytest.raises(ConfigError, match="testbed keys"):
        load_on_inventory(run_file, [], inventory)


def test_a_split_that_the_inventory_names_is_the_model_of_the_run(tmp_path: Path) -> None:
    inventory = read(tmp_path, LAB.replace("    wdmoe_bs_port", "    wdmoe_split: /data/split\n    wdmoe_bs_port"))
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN + "[placement]\norin-0 = [0]\norin-1 = [1]\n")
    config = load_on_inventory(run_file, [], inventory)
    assert (config.model.path, config.placement) == ("/data/split", None)
