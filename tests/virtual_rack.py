"""A virtual rack for tests, and nodes on it as a person would put them there: by ssh, keys, shards, a systemd unit."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from processes import TESTBED
from runs_on_boards import write_run_file

from testbed.fleet.inventory import Board, Inventory, read_inventory
from testbed.fleet.rack_root import BASES, root_folder
from testbed.fleet.rack_system import missing
from testbed.fleet.remote import ask, ssh_command
from testbed.wire.keys import make_run_keys

COMMAND_S = 300.0
UNIT = """[Unit]
Description=Experts of {name}
StartLimitIntervalSec=0
[Service]
User=jetson
ExecStart={python} -m jetson_node --name {name} --station tcp://{station} --shards {home}/split \\
    --keys {home}/keys --backend numpy --join-timeout-s 0
Restart=always
RestartSec=0.2
[Install]
WantedBy=multi-user.target
"""
HOME = "/home/jetson"


def why_not() -> str | None:
    """Why there can be no virtual rack here, or None. Its root is not built by tests: that takes minutes."""
    reason = missing()
    if reason is None and not root_folder(BASES["debian"]).is_dir():
        return "the root of virtual boards is not built: testbed rack up --nodes 1 && testbed rack down"
    return reason


@contextmanager
def only_one() -> Iterator[None]:
    """Racks of tests have the same name each time, so that one that was killed is cleaned up by the next."""
    with (Path(tempfile.gettempdir()) / "wdmoe-rack-tests.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AssertionError("tests of virtual racks are under way already: wait for them") from None
        yield


@contextmanager
def rack_up(testbed: Testbed, inventory: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """A rack, of which nothing is left in the end, whoever ends it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with only_one():
        testbed.on_rack("down")
        try:
            yield testbed.on_rack("up", "--inventory", str(inventory), *arguments)
        finally:
            testbed.on_rack("down")
            signal.signal(signal.SIGTERM, before)
        assert left_of(testbed.rack, testbed.state) == {}
        assert not inventory.exists()


@dataclass(frozen=True)
class Testbed:
    """The `testbed` command, with state of its own."""

    state: Path
    rack: str

    __test__ = False

    def run(self, *arguments: str | Path, within_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TESTBED, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=within_s,
            env=self.environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [TESTBED, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "XDG_STATE_HOME": str(self.state)}

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        """The document that a command which succeeds ends with."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document

    def on_rack(self, verb: str, *arguments: str) -> dict[str, Any]:
        return self.json("rack", verb, *arguments, "--name", self.rack)


def put_nodes(testbed: Testbed, inventory_file: Path, folder: Path) -> Path:
    """Keys, shards and a unit on every board. Returns the run file."""
    inventory = read_inventory(inventory_file)
    make_run_keys(folder / "keys", [board.name for board in inventory.boards])
    run_file = write_run_file(folder, generated=0)
    split = Path(testbed.json("fleet", "split", run_file, "--inventory", inventory_file)["folder"])
    for board in inventory.boards:
        _send(board, _what_it_needs(board, inventory, split, folder / "keys" / board.name))
    return run_file


def _what_it_needs(board: Board, inventory: Inventory, split: Path, keys: Path) -> bytes:
    station = f"{inventory.bs_address}:{inventory.bs_port}"
    unit = UNIT.format(name=board.name, python=board.python, station=station, home=HOME).encode()
    files = {f"keys/{path.name}": path.read_bytes() for path in keys.iterdir()}
    files |= {
        f"split/{name}": (split / name).read_bytes() for name in ("manifest.json", f"node-{board.name}.safetensors")
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in {**files, board.unit: unit}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _send(board: Board, archive: bytes) -> None:
    install = f"tar -x -C {HOME} && sudo -n install -m 644 {HOME}/{board.unit} /etc/systemd/system/"
    install += f" && sudo -n systemctl enable --now {board.unit}"
    done = subprocess.run([*ssh_command(board), install], input=archive, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def on_board(board: Board, script: str) -> str:
    """What a script prints on a board, where it must succeed."""
    answer = ask(board, script)
    assert answer.good, answer
    return answer.out


def left_of(rack: str, state: Path) -> dict[str, list[str]]:
    """Whatever of this machine carries the rack's name: links, namespaces, mounts, cgroups, files and more."""
    from testbed.fleet.rack_system import DeviceCgroup

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    mounts = Path("/proc/mounts").read_text().splitlines()
    found = {
        "links": [line for line in lines("ip", "-br", "link") if f"wd-{rack}" in line],
        "namespaces": [line for line in lines("ip", "netns", "list") if f"wd-{rack}" in line],
        "mounts": [line for line in mounts if f"wd-{rack}-" in line or str(state) in line],
        "cgroups": [group.name for group in DeviceCgroup.named(f"wdmoe-{rack}-")],
        "tables": [line for line in lines("nft", "list", "tables") if f"wdmoe-{rack}" in line],
        "queues": [line for line in lines("tc", "qdisc", "show") if f"wd-{rack}" in line],
        "processes": [
            str(p.pid) for p in psutil.process_iter(["cmdline"]) if _boots_from(p.info["cmdline"] or (), state)
        ],
        "files": [str(path) for path in state.glob("wdmoe-testbed/racks/*")],
    }
    return {what: some for what, some in found.items() if some}


def _boots_from(command: Sequence[str], state: Path) -> bool:
    return any(word.startswith(f"--directory={state}/") for word in command)
