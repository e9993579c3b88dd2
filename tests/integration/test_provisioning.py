"""Bare virtual boards become nodes by Ansible, run, are broken and torn down: real ssh, systemd and CURVE."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("yaml")

from playbooks import Playbooks, boards_heard, why_no_ansible
from runs_on_boards import ALERT_S, LiveRun, run_under_way, write_run_file
from virtual_rack import Testbed, on_board, rack_up, why_not

from testbed.errors import NodeError
from testbed.fleet.inventory import Inventory, read_inventory
from testbed.fleet.remote import ask
from testbed.runlog.reader import read_events

REASON = why_not() or why_no_ansible()
pytestmark = [
    pytest.mark.root,
    pytest.mark.provisioning,
    pytest.mark.torch,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
DEVICES = ["jetson-0", "jetson-1", "jetson-2", "jetson-3"]
WITH_REBOOT = "jetson-1"  # its power mode can only be had by a reboot
MODES = {name: "7W" if name == WITH_REBOOT else "MAXN_SUPER" for name in DEVICES}
GROUP_VARS = """wdmoe_keys: {folder}/keys
wdmoe_split: {split}
wdmoe_bs_python: {python}
jetson_power_mode: MAXN_SUPER
"""
LONG = 80  # prompts: more than any test waits for
LEFT_ON_A_BOARD = """ls -d /etc/wdmoe /opt/testbed /var/lib/wdmoe* /var/cache/wdmoe* 2>/dev/null
ls -d /etc/apt/apt.conf.d/99wdmoe /etc/systemd/system/wdmoe* /etc/systemd/system/*.wants/wdmoe* 2>/dev/null
systemctl list-units --all --no-legend 'wdmoe*'
getent passwd wdmoe-node
pgrep -a -f jetson_node
true
"""


class Rack(NamedTuple):
    testbed: Testbed
    file: Path
    inventory: Inventory
    folder: Path
    playbooks: Playbooks

    def run_file(self, *, generated: int, patience_s: float | None = None) -> Path:
        patience = {} if patience_s is None else {"patience_s": patience_s}
        return write_run_file(self.folder, generated=generated, **patience)


@pytest.fixture(scope="module")
def rack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    """Bare boards that site.yml made nodes of; in the end teardown.yml leaves nothing of it on them."""
    folder = tmp_path_factory.mktemp("chain")
    testbed, file = Testbed(folder / "state", "chain"), folder / "rack.yml"
    playbooks = Playbooks(file, folder)
    with rack_up(testbed, file, "--nodes", str(len(DEVICES)), "--bare") as said, boards_heard(testbed, file):
        assert said["devices"] == DEVICES
        _say_what_is_wanted(testbed, file, folder)
        recap = playbooks.play("site.yml")
        assert set(DEVICES) < set(recap)
        assert all(counts["failed"] == counts["unreachable"] == 0 for counts in recap.values())
        yield Rack(testbed, file, read_inventory(file), folder, playbooks)
        if request.session.exitstatus != pytest.ExitCode.INTERRUPTED:
            playbooks.play("teardown.yml")
            left = {board.name: on_board(board, LEFT_ON_A_BOARD) for board in read_inventory(file).boards}
            assert left == dict.fromkeys(DEVICES, "")
            assert list((folder / "keys/bs/nodes").iterdir()) == []


def _say_what_is_wanted(testbed: Testbed, file: Path, folder: Path) -> None:
    """Variables beside the inventory: where keys and shards lie, and the boards' power modes."""
    split = testbed.json("fleet", "split", write_run_file(folder, generated=0), "--inventory", file)["folder"]
    for kind in ("group_vars", "host_vars"):
        (folder / kind).mkdir()
    (folder / "group_vars/all.yml").write_text(GROUP_VARS.format(folder=folder, split=split, python=sys.executable))
    (folder / f"host_vars/{WITH_REBOOT}.yml").write_text(f"jetson_power_mode: {MODES[WITH_REBOOT]}\n")


def test_a_second_time_nothing_changes(rack: Rack) -> None:
    recap = rack.playbooks.play("site.yml")
    assert {host: counts["changed"] for host, counts in recap.items()} == dict.fromkeys(recap, 0)


def test_the_boards_are_found_to_be_as_they_should_be(rack: Rack) -> None:
    rack.playbooks.play("verify.yml")
    status = rack.testbed.json("fleet", "status", "--inventory", rack.file)
    assert [board["state"] for board in status["boards"]] == ["active"] * len(DEVICES)


def test_a_run_under_two_policies_is_logged_with_what_boards_said_and_what_they_wrote_themselves(rack: Rack) -> None:
    logs, collected = rack.folder / "logs", rack.folder / "collected"
    run_file = rack.run_file(generated=0)
    with boards_heard(rack.testbed, rack.file):
        document = rack.testbed.json("run", run_file, "--inventory", rack.file, "--out", logs)
    rows = [(row["policy"], row["lost"], row["orphaned"]) for row in document["rows"]]
    assert rows == [("topk", 0, 0), ("wlr", 0, 0)]
    assert "virtual boards" in document["links"]
    said = {event["device"]: event for event in read_events(logs / document["run"]) if event["kind"] == "board"}
    assert {name: (event["virtual"], event["power_mode"]) for name, event in said.items()} == {
        name: (True, mode) for name, mode in MODES.items()
    }
    assert all(event["clocks_locked"] for event in said.values())

    rack.playbooks.play("collect_logs.yml", "-e", f"collect_to={collected}")
    folders = [collected / name for name in DEVICES]
    merged = rack.testbed.json("logs", "collect", document["run"], *folders, "--logs", logs)
    assert merged["problems"] == []
    assert {node["node"]: (node["served"] > 0, node["only_bs"]) for node in merged["nodes"]} == dict.fromkeys(
        DEVICES, (True, 0)
    )


def test_nodes_that_hang_and_boards_that_hang_lose_link_or_power_or_reboot_in_a_run_are_used_again(rack: Rack) -> None:
    def by_rack(verb: str, device: str) -> Callable[[], object]:
        return lambda: rack.testbed.on_rack(verb, device)

    def by_itself() -> None:
        """It comes back without anybody's help."""

    def on(device: str, script: str) -> Callable[[], object]:
        return lambda: ask(rack.inventory.chosen([device])[0], script)

    run_file, out = rack.run_file(generated=LONG, patience_s=ALERT_S), rack.folder / "logs-of-faults"
    started = rack.testbed.start("run", run_file, "--inventory", rack.file, "--out", out, "--json")
    with run_under_way(started, out) as run, boards_heard(rack.testbed, rack.file):
        is_survived(run, "jetson-0", by_rack("freeze", "jetson-0"), by_rack("thaw", "jetson-0"))
        is_survived(run, "jetson-1", by_rack("cut", "jetson-1"), by_rack("mend", "jetson-1"))
        is_survived(run, "jetson-2", by_rack("kill", "jetson-2"), by_rack("reboot", "jetson-2"))
        is_survived(run, "jetson-3", on("jetson-3", "sudo -n systemctl reboot"), by_itself)
        hang = "sudo -n systemctl kill --signal=STOP wdmoe-node.service"  # its watchdog ends it
        is_survived(run, "jetson-1", on("jetson-1", hang), by_itself)


def is_survived(run: LiveRun, device: str, fault: Callable[[], object], mending: Callable[[], object]) -> None:
    """The run goes on without the board, and uses it again once it is mended."""
    run.wait_for(lambda: run.has(device), f"{device} in the run")
    fault()
    run.wait_for(lambda: not run.has(device), f"{device} lost")
    mending()
    run.wait_for(lambda: run.has(device), f"{device} back in the run")
    answered = run.answered(DEVICES.index(device))
    run.wait_for(lambda: run.answered(DEVICES.index(device)) > answered, f"{device} used again")


def test_a_key_that_was_never_enrolled_is_refused_in_one_line_and_disturbs_nobody(rack: Rack) -> None:
    board, station = rack.inventory.boards[3], f"tcp://{rack.inventory.bs_address}:{rack.inventory.bs_port}"
    testbed, keys = Path(board.python).with_name("testbed"), "$HOME/stranger"
    make = f"{testbed} keys {keys} {board.name} > /dev/null && sudo -n cp /etc/wdmoe/keys/bs.pub {keys}/{board.name}/"
    public = on_board(board, f"{make} && cat {keys}/{board.name}/{board.name}.pub").strip()
    node = f"sudo -n {testbed} node --name {board.name} --station {station} --keys {keys}/{board.name}"
    run_file, out = rack.run_file(generated=LONG), rack.folder / "logs-of-a-stranger"
    started = rack.testbed.start("run", run_file, "--inventory", rack.file, "--out", out, "--json")
    with run_under_way(started, out) as run, boards_heard(rack.testbed, rack.file):
        answer = ask(board, f"{node} --shards /var/lib/wdmoe/shards --join-timeout-s 5", timeout_s=120.0)
        assert (answer.code, answer.out) == (NodeError.exit_code, ""), answer
        assert f"it does not know our key: put {board.name}.pub into its keys/nodes folder" in answer.error
        assert public in [event.get("public_key") for event in read_events(run.folder)]
        answered = run.answered(DEVICES.index(board.name))
        run.wait_for(lambda: run.answered(DEVICES.index(board.name)) > answered, "the enrolled one goes on")
        assert run.has(board.name)
