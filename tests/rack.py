"""A base station in this process and real node processes around it: real sockets, CURVE and an allow-list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bs_node.dispatcher import Dispatcher
from bs_node.registry import Registry
from bs_node.session import Session
from bs_node.station import Station
from bs_node.wireless import WirelessDispatcher, WireSettings
from testbed.checkpoint.manifest import Manifest, load_manifest
from testbed.fleet.local import LocalFleet
from testbed.latency.estimator import Estimator
from testbed.policies.topk import TopK
from testbed.wire.keys import enrolled_nodes, make_run_keys, read_pair
from testbed.wire.sockets import AllowList, StationSocket

HOST = "127.0.0.1"
JOIN_S = 60.0
REPLY_S = 60.0
SILENCE_S = 2.5  # as a run file has it unless it says otherwise


@dataclass(frozen=True, slots=True)
class Rack:
    """A station whose nodes have all joined."""

    split_dir: Path
    manifest: Manifest
    listening: Listening
    fleet: LocalFleet

    @property
    def station(self) -> Station:
        return self.listening.station

    def wireless(self, down: str = "fp32", up: str = "fp32", part_bytes: int = 65536) -> WirelessDispatcher:
        """A dispatcher over this rack's sockets. Of several, only one may be in a round."""
        settings = WireSettings(down, up, part_bytes, window_bytes=2**20, padded_width=0, reply_s=REPLY_S)
        return WirelessDispatcher(self.station, settings)

    def session(self, dispatcher: Dispatcher) -> Session:
        """Nothing is logged; policy and dispatcher may be exchanged between two rounds."""
        devices = len(self.manifest.devices)
        return Session(TopK(), dispatcher, Estimator(devices, 4096, 4096), self.station.registry.nodes)

    def model(self, session: Session) -> Any:
        """The base station's part of the model in fp32, its experts wherever the session's dispatcher finds them."""
        from bs_node.model import load_bs_model
        from bs_node.remote_experts import IMPLEMENTATION, attach

        model = load_bs_model(self.split_dir, self.manifest, "float32", IMPLEMENTATION)
        attach(model, self.manifest, session)
        return model


@dataclass(frozen=True, slots=True)
class Listening:
    """A base station that listens, without nodes yet; it hears them while somebody calls `station.receive`."""

    station: Station
    keys: Path  # a folder per device, and the base station's own
    port: int
    events: list[tuple[str, dict[str, Any]]]

    def node_arguments(self, name: str, split_dir: Path, port: int | None = None) -> list[str]:
        """What one types on a board to start the node `name`."""
        endpoint = f"tcp://{HOST}:{port or self.port}"
        argv = ["--name", name, "--station", endpoint, "--shards", str(split_dir), "--keys", str(self.keys / name)]
        return [*argv, "--rows", str(self.keys / name / "rows")]

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The facts of all events of a kind."""
        return [facts for told, facts in self.events if told == kind]


@contextmanager
def base_station(manifest: Manifest, folder: Path) -> Iterator[Listening]:
    """Make keys for every device of the manifest in `folder`, and listen."""
    keys = folder / "keys"
    make_run_keys(keys, list(manifest.devices))
    enrolled = enrolled_nodes(keys / "bs")
    events: list[tuple[str, dict[str, Any]]] = []

    def on_event(kind: str, **facts: Any) -> None:
        events.append((kind, facts))

    sockets = StationSocket(HOST, 0, read_pair(keys / "bs", "bs"), AllowList(enrolled))
    try:
        registry = Registry(manifest, silence_ns=int(SILENCE_S * 1e9))
        every = {"heartbeat_ns": 500_000_000, "window_bytes": 2**20}
        station = Station(sockets, registry, run=1, enrolled=enrolled, on_event=on_event, **every)
        yield Listening(station, keys, sockets.port, events)
    finally:
        sockets.close()


@contextmanager
def rack(
    split_dir: Path,
    folder: Path,
    *,
    port_for_nodes: Callable[[int], int] = lambda port: port,
    arguments: Sequence[str] = (),
) -> Iterator[Rack]:
    """Start a node process for every device of a split and wait until all have joined; stop them all at the end.

    Keys and the nodes' output go into `folder`. `port_for_nodes` puts something between the station and its nodes;
    `arguments` are given to every node.
    """
    manifest = load_manifest(split_dir)
    with base_station(manifest, folder) as listening:
        port = port_for_nodes(listening.port)
        argv_of = {
            name: [*listening.node_arguments(name, split_dir, port), "--stop-with-parent", *arguments]
            for name in manifest.devices
        }

        def on_event(kind: str, **facts: Any) -> None:
            listening.events.append((kind, facts))

        with LocalFleet(argv_of, folder / "nodes", on_event) as fleet:
            listening.station.wait_for_all(JOIN_S, fleet.raise_if_dead)
            yield Rack(split_dir, manifest, listening, fleet)
            listening.station.say_goodbye()
