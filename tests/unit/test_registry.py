from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from splits import write_split

from bs_node.registry import Registry
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import Manifest, manifest_hash
from testbed.wire.messages import PROTOCOL_VERSION, Hello

SILENCE_NS = 1000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Devices near and far, two layers of four experts."""
    folder: Path = tmp_path_factory.mktemp("split")
    return write_split(folder, FfnSpec(width=4, inner=4))[0]


@pytest.fixture
def registry(manifest: Manifest) -> Registry:
    return Registry(manifest, SILENCE_NS)


@pytest.fixture
def hello(manifest: Manifest) -> Callable[..., Hello]:
    def make(device: str = "near", **changed: Any) -> Hello:
        said = Hello(PROTOCOL_VERSION, device, 1, manifest_hash(manifest), [2, 2], {})
        return replace(said, **changed)

    return make


HelloOf = Callable[..., Hello]


def test_a_node_of_this_run_is_not_refused(registry: Registry, hello: HelloOf) -> None:
    assert registry.refusal(hello("near"), "near") is None
    assert registry.refusal(hello("far"), None) is None


def test_on_what_a_node_computes_is_known_once_it_was_welcomed(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello("near", computes="torch cuda float16 (Orin)"), b"a", 1, 0)
    assert node.computes == "torch cuda float16 (Orin)"
    assert registry.nodes[1].computes == "", "far has said nothing yet"


@pytest.mark.parametrize(
    ("said", "enrolled_as", "words"),
    [
        ({"protocol": 99}, "near", ["protocol 99", f"station {PROTOCOL_VERSION}", "install the same version"]),
        ({"device": "moon"}, "near", ["no device 'moon'", "near, far"]),
        ({"device": "mo\non\x1b[31m"}, None, ["no device 'mo\\non"]),
        ({"device": "far"}, "near", ["enrolled as 'near', not 'far'", "--name near"]),
        ({}, "nobody", ["enrolled as 'nobody', not 'near'"]),
        (
            {"manifest_sha256": "ab" * 32},
            "near",
            ["another model or split", "'abababababab'", "copy this run's shards"],
        ),
        ({"manifest_sha256": "a\nb"}, None, ["another model or split"]),
        ({"experts_held": [2, 3]}, "near", ["other experts than the manifest gives it", "copy"]),
        ({"experts_held": [2]}, "near", ["other experts"]),
        ({"experts_held": []}, "near", ["other experts"]),
    ],
)
def test_who_cannot_take_part_is_told_why_in_one_line(
    registry: Registry, hello: HelloOf, said: dict[str, Any], enrolled_as: str | None, words: list[str]
) -> None:
    reason = registry.refusal(hello(**said), enrolled_as)
    assert reason is not None
    assert reason.isprintable()
    for expected in words:
        assert expected in reason


def test_a_refused_version_is_named_first_whatever_else_is_wrong(registry: Registry, hello: HelloOf) -> None:
    reason = registry.refusal(hello("moon", protocol=PROTOCOL_VERSION + 1, manifest_sha256="", experts_held=[]), "far")
    assert reason is not None
    assert f"protocol {PROTOCOL_VERSION + 1}" in reason


def test_devices_stand_in_the_order_of_the_split_and_are_away_at_first(registry: Registry) -> None:
    assert [(node.index, node.name) for node in registry.nodes] == [(0, "near"), (1, "far")]
    assert [node.available for node in registry.nodes] == [False, False]
    assert registry.missing() == ["near", "far"]


def test_a_welcomed_node_is_there(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello("far", boot_id=5, emulated={"row_s": 1e-3}), b"id", 20, 0)
    assert registry.node_at(b"id") is node
    assert (node.name, node.boot_id, node.emulated, node.joins) == ("far", 5, {"row_s": 1e-3}, 1)
    assert [node.available for node in registry.nodes] == [False, True]
    assert registry.missing() == ["near"]
    assert registry.node_at(b"other") is None


def test_the_newest_connection_of_a_name_wins(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello(boot_id=1), b"old", 20, 0)
    assert registry.welcome(hello(boot_id=2), b"new", 21, 0) is node
    assert registry.node_at(b"old") is None
    assert registry.node_at(b"new") is node
    assert (node.boot_id, node.joins) == (2, 2)
    assert registry.disconnected(20) is None
    assert node.available


def test_a_hello_said_twice_on_one_connection_is_one_join(registry: Registry, hello: HelloOf) -> None:
    for now_ns in (0, 1):
        node = registry.welcome(hello(), b"id", 20, now_ns)
    assert node.joins == 1
    assert registry.node_at(b"id") is node


def test_a_connection_that_takes_another_name_loses_the_first(registry: Registry, hello: HelloOf) -> None:
    near = registry.welcome(hello("near"), b"id", 20, 0)
    far = registry.welcome(hello("far"), b"id", 20, 0)
    assert registry.node_at(b"id") is far
    assert [node.available for node in registry.nodes] == [False, True]
    assert registry.disconnected(20) is far
    assert not near.available
    assert not far.available


def test_a_connection_is_forgotten_by_its_descriptor(registry: Registry, hello: HelloOf) -> None:
    near = registry.welcome(hello("near"), b"1", 20, 0)
    far = registry.welcome(hello("far"), b"2", 21, 0)
    assert registry.disconnected(99) is None
    assert registry.disconnected(-1) is None
    assert registry.disconnected(20) is near
    assert registry.disconnected(20) is None
    assert registry.node_at(b"1") is None
    assert registry.missing() == ["near"]
    assert far.available


def test_a_descriptor_that_the_system_gave_out_again_names_the_new_connection(
    registry: Registry, hello: HelloOf
) -> None:
    registry.welcome(hello("near"), b"1", 20, 0)
    registry.disconnected(20)
    far = registry.welcome(hello("far"), b"2", 20, 0)
    assert registry.disconnected(20) is far


def test_a_forgotten_node_comes_back(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello(boot_id=1), b"1", 20, 0)
    assert registry.forget(node) is node
    assert not node.available
    assert registry.node_at(b"1") is None
    assert registry.forget(node) is node
    assert registry.welcome(hello(boot_id=2), b"2", 20, 0) is node
    assert node.available
    assert registry.node_at(b"2") is node
    assert node.joins == 2


def test_a_node_is_silent_once_and_after_more_than_the_allowed_time(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello(), b"1", 20, 500)
    assert registry.newly_silent(500 + SILENCE_NS) == []
    assert registry.newly_silent(501 + SILENCE_NS) == [node]
    assert registry.newly_silent(10**9) == []
    assert registry.missing() == ["near", "far"]


def test_a_silent_node_that_is_heard_is_there_again(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello(), b"1", 20, 0)
    registry.newly_silent(2 * SILENCE_NS)
    registry.heard(node, 3 * SILENCE_NS)
    assert node.available
    assert registry.newly_silent(4 * SILENCE_NS) == []
    assert registry.newly_silent(4 * SILENCE_NS + 1) == [node]


def test_silence_that_was_announced_is_no_reason_to_worry(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello(), b"1", 20, 0)
    node.busy_until_ns = 10 * SILENCE_NS
    assert registry.newly_silent(11 * SILENCE_NS) == []
    assert registry.newly_silent(11 * SILENCE_NS + 1) == [node]


def test_an_announcement_ends_with_the_process_that_made_it(registry: Registry, hello: HelloOf) -> None:
    node = registry.welcome(hello(boot_id=1), b"1", 20, 0)
    node.busy_until_ns = 10**9
    registry.welcome(hello(boot_id=2), b"2", 21, 0)
    assert registry.newly_silent(SILENCE_NS + 1) == [node]


def test_a_node_that_is_away_cannot_fall_silent(registry: Registry, hello: HelloOf) -> None:
    registry.forget(registry.welcome(hello(), b"1", 20, 0))
    assert registry.newly_silent(10**12) == []
