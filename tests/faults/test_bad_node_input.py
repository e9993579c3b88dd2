"""What is wrong at a node is one line there, and at the base station an event; neither waits for what cannot come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zmq
from processes import JETSON_NODE, started, until
from rack import Listening, base_station
from splits import DEVICES, write_split

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest, manifest_hash, shard_name
from testbed.wire.keys import make_pair, read_pair, read_public, write_pair, write_public
from testbed.wire.messages import PROTOCOL_VERSION, Hello, Refuse, decode_from_base_station, encode
from testbed.wire.sockets import NodeSocket

SPEC = FfnSpec(width=8, inner=8, has_gate=True, act="silu")
NODE = DEVICES[0]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_split(tmp_path / "split", SPEC)[0]


@pytest.fixture
def listening(manifest: Manifest, tmp_path: Path) -> Iterator[Listening]:
    with base_station(manifest, tmp_path) as station:
        yield station


def node_fails(listening: Listening, folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a node that must not join, while the station listens."""
    argv = [*JETSON_NODE, *listening.node_arguments(NODE, folder / "split"), *("--backend", "numpy"), *arguments]
    with started(argv, folder) as command:

        def ended() -> bool:
            listening.station.receive(20)
            return command.process.poll() is not None

        until(ended, 30, "end of the node")
        done = command.finish()
        command.wait_until_nothing_runs()
    assert not listening.told("node_joined")
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr


def test_a_shard_whose_bytes_differ_from_its_hash_is_refused(listening: Listening, tmp_path: Path) -> None:
    shard = tmp_path / "split" / shard_name(NODE)
    flipped = bytearray(shard.read_bytes())
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    code, told = node_fails(listening, tmp_path)
    assert code == 3
    assert f"{shard}: sha256" in told
    assert "copy it again" in told


def test_a_node_with_another_split_is_told_so(listening: Listening, tmp_path: Path) -> None:
    write_split(tmp_path / "split", SPEC, layers=3)
    code, told = node_fails(listening, tmp_path)
    assert code == 4
    assert "another model or split" in told
    assert "copy this run's shards to it" in told
    assert [facts["device"] for facts in listening.told("node_refused")] == [NODE]


def test_a_node_of_another_protocol_version_is_told_both_versions(
    listening: Listening, manifest: Manifest, tmp_path: Path
) -> None:
    hello = Hello(PROTOCOL_VERSION + 1, NODE, 1, manifest_hash(manifest), manifest.held_counts(NODE), {})
    keys = listening.keys / NODE
    node = NodeSocket(f"tcp://127.0.0.1:{listening.port}", read_pair(keys, NODE), read_public(keys / "bs.pub"))
    try:
        until(lambda: node.socket.poll(20, zmq.POLLOUT), 10, "a connection")
        node.socket.send(encode(hello))
        until(lambda: listening.station.receive(20) or node.socket.poll(0), 10, "an answer")
        answer = decode_from_base_station(node.socket.recv())
    finally:
        node.close()
    assert isinstance(answer, Refuse)
    assert f"protocol {PROTOCOL_VERSION + 1}, the base station {PROTOCOL_VERSION}" in answer.reason
    assert listening.told("node_refused")
    assert not listening.told("node_joined")


def test_a_key_that_is_not_enrolled_is_told_where_to_enrol_it(listening: Listening, tmp_path: Path) -> None:
    pair, keys = make_pair(), tmp_path / "stranger"
    write_pair(keys, NODE, pair)
    write_public(keys, "bs", read_public(listening.keys / NODE / "bs.pub"))
    code, told = node_fails(listening, tmp_path, "--keys", str(keys), "--join-timeout-s", "1.5")
    assert code == 5
    assert f"put {NODE}.pub into its keys/nodes folder" in told
    assert listening.told("key_refused")[0] == {"public_key": pair.public}


def test_another_base_stations_key_is_taken_for_what_it_may_be(listening: Listening, tmp_path: Path) -> None:
    write_public(listening.keys / NODE, "bs", make_pair().public)
    code, told = node_fails(listening, tmp_path, "--join-timeout-s", "1.5")
    assert code == 5
    assert "wrong bs.pub here" in told


def test_one_devices_key_does_not_open_the_door_under_anothers_name(listening: Listening, tmp_path: Path) -> None:
    other = DEVICES[1]
    for suffix in ("key", "pub"):
        (listening.keys / NODE / f"{other}.{suffix}").write_bytes(
            (listening.keys / NODE / f"{NODE}.{suffix}").read_bytes()
        )
    (listening.keys / NODE / f"{other}.key").chmod(0o600)
    code, told = node_fails(listening, tmp_path, "--name", other)
    assert code == 4
    assert f"its key is enrolled as '{NODE}'" in told


def test_a_secret_key_that_others_can_read_is_not_used(listening: Listening, tmp_path: Path) -> None:
    secret = listening.keys / NODE / f"{NODE}.key"
    secret.chmod(0o644)
    assert node_fails(listening, tmp_path) == (
        2,
        f"error: {secret}: mode 0644 lets others read a secret key: chmod 600 it\n",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--name", "nearby"], 2, "--name nearby: not a device of"),
        (["--keys", "/none"], 2, f"/none/{NODE}.key: No such file or directory"),
        (["--shards", "/none"], 3, "/none/manifest.json: No such file or directory"),
        (["--station", "10.0.0.1:5555"], 2, "--station: 10.0.0.1:5555 is not tcp://ADDRESS:PORT"),
        (["--station", "tcp://127.0.0.1:70000"], 2, "--station: tcp://127.0.0.1:70000"),
        (["--station", "tcp://127.0.0.1:1", "--join-timeout-s", "0.5"], 5, "is it running, and is this its address?"),
        (["--threads", "0"], 2, "--threads: 0 is not a whole number above 0"),
        (["--emulated-row-s", "0"], 2, "--emulated-row-s: 0 is not above 0"),
        (["--join-timeout-s", "soon"], 2, "--join-timeout-s: soon is not a number from 0 up"),
        (["--nmae", "near"], 2, "--nmae"),
    ],
)
def test_a_wrong_option_of_a_node_is_named(
    arguments: Sequence[str], code: int, said: str, listening: Listening, tmp_path: Path
) -> None:
    found, told = node_fails(listening, tmp_path, *arguments)
    assert (found, said in told) == (code, True), told
