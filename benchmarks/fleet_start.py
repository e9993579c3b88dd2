"""How long eight nodes take from being started to being welcome, the demo model's shards loaded and warm.

    python benchmarks/fleet_start.py --nodes 8

The last line is one JSON document. Not a ratio: it is the time a user waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from testbed.fleet.local import LocalFleet
from testbed.wire.keys import enrolled_nodes, make_run_keys, read_pair
from testbed.wire.sockets import AllowList, StationSocket


def ignore(*_: object, **__: object) -> None:
    """Events are not what is measured."""


def start_once(shards: Path, keys: Path, names: list[str], outputs: Path) -> float:
    """Seconds from the first process to the last welcome."""
    from bs_node.registry import Registry
    from bs_node.station import Station
    from testbed.checkpoint.manifest import load_manifest

    enrolled = enrolled_nodes(keys / "bs")
    sockets = StationSocket("127.0.0.1", 0, read_pair(keys / "bs", "bs"), AllowList(enrolled))
    registry = Registry(load_manifest(shards), 5_000_000_000)
    station = Station(
        sockets, registry, run=1, enrolled=enrolled, heartbeat_ns=10**9, window_bytes=2**20, on_event=ignore
    )
    endpoint = f"tcp://127.0.0.1:{sockets.port}"
    argv = {
        name: ["--name", name, "--station", endpoint, "--shards", str(shards), "--keys", str(keys / name)]
        for name in names
    }
    started_s = time.monotonic()
    with LocalFleet(argv, outputs, ignore) as fleet:
        station.wait_for_all(60.0, fleet.raise_if_dead)
        taken_s = time.monotonic() - started_s
        station.say_goodbye()
    sockets.close()
    return taken_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from testbed.checkpoint.split import split  # here, because every node process imports this file

    names = [f"node-{i}" for i in range(args.nodes)]
    demo = Path(__file__).parents[1] / "testbed" / "demo" / "model"
    with tempfile.TemporaryDirectory() as folder:
        shards, keys = Path(folder) / "split", Path(folder) / "keys"
        split(demo, shards, names)
        make_run_keys(keys, names)
        taken_s = [start_once(shards, keys, names, Path(folder) / f"out-{i}") for i in range(args.repeats)]
    first_s, warm_s = taken_s[0], statistics.median(taken_s[1:]) if taken_s[1:] else taken_s[0]
    print(f"{args.nodes} nodes ready after {first_s:.2f} s, and {warm_s:.2f} s once the fork server is there")
    print(json.dumps({"nodes": args.nodes, "ready_s": first_s, "ready_with_fork_server_s": warm_s}))


if __name__ == "__main__":
    main()
