"""Who the nodes are, and who is there right now. No sockets, no clock of its own: events in, answers out."""

from __future__ import annotations

from dataclasses import dataclass, field

from bs_node.power import BoardPower
from testbed.checkpoint.manifest import Manifest, manifest_hash
from testbed.latency.clock_sync import ClockSync
from testbed.wire.messages import PROTOCOL_VERSION, Hello


@dataclass(slots=True)
class Node:
    """One device of the run, whether it is there or not."""

    index: int
    name: str
    routing_id: bytes | None = None  # of its newest connection; None while it has none
    descriptor: int = -1  # of that connection's socket, by which the monitor names it
    boot_id: int | None = None
    last_heard_ns: int = 0
    busy_until_ns: int = 0  # it announced a long block: silence until then is no reason to worry
    silent: bool = False
    joins: int = 0
    broken_messages: int = 0
    emulated: dict[str, float | None] = field(default_factory=dict)
    computes: str = ""  # on what, and in which weights
    figures: dict[str, float | None] = field(default_factory=dict)
    power: BoardPower = field(default_factory=BoardPower)
    clock: ClockSync = field(default_factory=ClockSync)  # of this boot

    @property
    def available(self) -> bool:
        return self.routing_id is not None and not self.silent


class Registry:
    """The devices of a split, in its order. A name belongs to the newest connection that may use it."""

    def __init__(self, manifest: Manifest, silence_ns: int) -> None:
        self.nodes = [Node(index, name) for index, name in enumerate(manifest.devices)]
        self._by_name = {node.name: node for node in self.nodes}
        self._by_routing_id: dict[bytes, Node] = {}
        self._manifest, self._manifest_hash = manifest, manifest_hash(manifest)
        self._silence_ns = silence_ns

    def node_at(self, routing_id: bytes) -> Node | None:
        return self._by_routing_id.get(routing_id)

    def refusal(self, hello: Hello, enrolled_as: str | None) -> str | None:
        """Why this node cannot take part, in one line; None if it can.

        `enrolled_as` is the name its key is enrolled under, None without keys.
        """
        if hello.protocol != PROTOCOL_VERSION:
            return f"it speaks protocol {hello.protocol}, the base station {PROTOCOL_VERSION}: install the same version"
        if hello.device not in self._by_name:
            return f"no device {hello.device!r} in this run (there are {', '.join(self._by_name)})"
        if enrolled_as is not None and enrolled_as != hello.device:
            return f"its key is enrolled as {enrolled_as!r}, not {hello.device!r}: start it with --name {enrolled_as}"
        if hello.manifest_sha256 != self._manifest_hash:
            return (
                f"its shards are of another model or split (manifest {hello.manifest_sha256[:12]!r}, the base station "
                f"has {self._manifest_hash[:12]!r}): copy this run's shards to it"
            )
        if hello.experts_held != self._manifest.held_counts(hello.device):
            return "it holds other experts than the manifest gives it: copy this run's shards to it"
        return None

    def welcome(self, hello: Hello, routing_id: bytes, descriptor: int, now_ns: int) -> Node:
        """Bind the name to this connection; an older one of the same name, or another name of it, is forgotten."""
        node, known = self._by_name[hello.device], self._by_routing_id.get(routing_id)
        if known is not node:
            node.joins += 1
            self.forget(node)
            if known is not None:
                self.forget(known)
        if node.boot_id != hello.boot_id:
            node.clock.reset()
        node.routing_id, node.descriptor, node.boot_id = routing_id, descriptor, hello.boot_id
        node.emulated, node.computes = hello.emulated, hello.computes
        self._by_routing_id[routing_id] = node
        self.heard(node, now_ns)
        node.busy_until_ns = 0
        return node

    def heard(self, node: Node, now_ns: int) -> None:
        node.last_heard_ns, node.silent = now_ns, False

    def disconnected(self, descriptor: int) -> Node | None:
        """The connection of this descriptor has ended; the node that it was, if it was anyone's."""
        for node in self.nodes:
            if node.routing_id is not None and node.descriptor == descriptor:
                return self.forget(node)
        return None

    def forget(self, node: Node) -> Node:
        if node.routing_id is not None:
            self._by_routing_id.pop(node.routing_id, None)
        node.routing_id, node.descriptor = None, -1
        return node

    def newly_silent(self, now_ns: int) -> list[Node]:
        """Nodes that have not been heard for too long, beyond what they announced."""
        silent = [
            node
            for node in self.nodes
            if node.available and now_ns - max(node.last_heard_ns, node.busy_until_ns) > self._silence_ns
        ]
        for node in silent:
            node.silent = True
        return silent

    def missing(self) -> list[str]:
        return [node.name for node in self.nodes if not node.available]
