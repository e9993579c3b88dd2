"""What one expert round costs beside what it cannot do without: eight nodes on loopback, int8 rows of 4096 values.

Three ways are measured in turns of 30 rounds in one run, with encryption off and on:

    wire    the same messages there and back, and codec, the same with the codec's arithmetic: see floors.py
    round   ours: select, group, quantise, send, check, dequantise, (echo), quantise, reply, check, combine, record

All three send parts of at most 64 KiB of values, as the wire format demands: 128 rows are eight messages each way.
The experts echo their rows, so that no FFN hides the cost. Ratios count: the machine's speed cancels.
The last line is one JSON document.

    python benchmarks/layer_round.py --rounds 300
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from floors import (
    DEVICES,
    EXPERTS,
    INT8,
    NAMES,
    TOP_K,
    WIDTH,
    codec_round,
    node_socket,
    open_station,
    routing,
    wire_round,
)

from testbed.collector import keep_what_is_loaded
from testbed.wire.keys import enrolled_nodes, make_run_keys

ROUNDS_PER_TURN = 30  # as the layers of a model follow one another


class EchoExperts:
    """Experts that give back what they get: everything of a node but the FFN."""

    backend = "echo"
    staging_ns = None

    def check(self, layer: int, segments: Sequence[tuple[int, int]], rows: int, width: int) -> None:
        if sum(n for _, n in segments) != rows or width != WIDTH:
            raise ValueError(f"layer {layer}: {rows} rows of {width} were not asked for")

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: Any) -> Any:
        return x_RD

    def warm_up(self) -> None:
        """Nothing to warm."""


def round_node(folder: Path, port: int, name: str, keys: Path | None) -> None:
    """A real node around experts that echo; it keeps its own rows, as nodes do."""
    from jetson_node.link import Link
    from jetson_node.rows import RowFiles
    from jetson_node.telemetry import Telemetry
    from jetson_node.worker import Worker
    from testbed.wire.messages import PROTOCOL_VERSION, Hello

    keep_what_is_loaded()
    hello = Hello(PROTOCOL_VERSION, name, 1, manifest_sha256(), [1], {})
    link = Link(lambda: node_socket(port, name, keys), hello, 60.0)
    rows = RowFiles(folder / name, name, boot_id=1)
    Worker(link, EchoExperts(), figures=Telemetry().figures, stop=lambda: False, rows=rows).run()
    link.close()


def manifest() -> Any:
    from testbed.checkpoint.ffn import FfnSpec
    from testbed.checkpoint.manifest import BS_NAME, FileEntry, Layer, Manifest, shard_name

    empty = FileEntry(sha256="0" * 64, bytes=0)
    layer = Layer(index=0, path="echo", experts=EXPERTS, top_k=TOP_K, spec=FfnSpec(width=WIDTH, inner=1))
    return Manifest(
        model_name="echo", model_type="echo", model_hash="0" * 64, source_hash="0" * 64, dtype="float32",
        devices=tuple(NAMES), layers=(layer,), placement=(tuple((name,) for name in NAMES),),
        files={BS_NAME: empty, **{shard_name(name): empty for name in NAMES}},
    )  # fmt: skip


def manifest_sha256() -> str:
    from testbed.checkpoint.manifest import manifest_hash

    return manifest_hash(manifest())


def our_round(stack: ExitStack, keys: Path | None) -> Callable[[int], None]:
    import torch

    from bs_node.registry import Registry
    from bs_node.remote_experts import RemoteLayer, remote_experts
    from bs_node.session import Session
    from bs_node.station import Station
    from bs_node.wireless import WirelessDispatcher, WireSettings
    from testbed.latency.estimator import Estimator
    from testbed.policies.wlr import WLR
    from testbed.runlog.recorder import Recorder

    torch.set_num_threads(1)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    sockets = open_station(stack, keys, partial(round_node, folder))
    recorder = stack.enter_context(Recorder(folder, "bench", NAMES, top_k=TOP_K, experts=0, segment_rows=1_000_000))
    registry = Registry(manifest(), 5_000_000_000)
    enrolled = None if keys is None else enrolled_nodes(keys / "bs")
    station = Station(
        sockets, registry, run=1, enrolled=enrolled, heartbeat_ns=500_000_000, window_bytes=2**20,
        on_event=recorder.event,
    )  # fmt: skip
    dispatcher = WirelessDispatcher(station, WireSettings("int8", "int8", 65536, 2**20, 0, 30.0))
    session = Session(
        WLR(0.0), dispatcher, Estimator(DEVICES, *[INT8.row_bytes(WIDTH)] * 2), registry.nodes, recorder=recorder
    )
    module = SimpleNamespace(remote=RemoteLayer(0, manifest().holds_NE(0), None, session))
    station.wait_for_all(60.0, lambda: None)
    keep_what_is_loaded()
    prepared: dict[int, Any] = {}

    def one(rows: int) -> None:
        if rows not in prepared:
            prepared[rows] = [torch.from_numpy(part) for part in routing(rows * DEVICES // TOP_K)]
        remote_experts(module, *prepared[rows])  # type: ignore[arg-type] # it only carries `remote`

    return one


class Seconds(NamedTuple):
    """Of one way's rounds. Learning and the log come with every seventh quick round or so: the mean has them."""

    median: float
    mean: float  # without the slowest hundredth, in which another process had the processor


def measure(keys: Path | None, rows_list: Sequence[int], rounds: int) -> dict[int, dict[str, Seconds]]:
    """What each way took for each row count, the ways taking turns."""
    with ExitStack() as stack:
        ways = {"wire": wire_round(stack, keys), "codec": codec_round(stack, keys), "round": our_round(stack, keys)}
        measured: dict[int, dict[str, Seconds]] = {}
        for rows in rows_list:
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(-(-rounds // ROUNDS_PER_TURN) + 1):
                for way, one in ways.items():
                    seconds = [timed(one, rows) for _ in range(ROUNDS_PER_TURN)]
                    taken[way] += seconds if turn else []  # the first turn warms up
            measured[rows] = {way: summed_up(seconds) for way, seconds in taken.items()}
        return measured


def summed_up(seconds: list[float]) -> Seconds:
    return Seconds(statistics.median(seconds), statistics.fmean(sorted(seconds)[: -(len(seconds) // 100) or None]))


def timed(one: Callable[[int], None], rows: int) -> float:
    started = time.perf_counter()
    one(rows)
    return time.perf_counter() - started


def ratios(measured: dict[int, dict[str, Seconds]], floor: str, figure: str) -> dict[str, float]:
    return {
        str(rows): round(getattr(m["round"], figure) / getattr(m[floor], figure), 3) for rows, m in measured.items()
    }


def print_table(encryption: str, measured: dict[int, dict[str, Seconds]]) -> None:
    columns = ratios(measured, "codec", "median"), ratios(measured, "codec", "mean"), ratios(measured, "wire", "median")
    print(f"\nencryption {encryption}: median ms of a round, eight nodes")
    print("rows per node      wire     codec     round   round/codec   of the means   round/wire")
    for rows, m in measured.items():
        ms = " ".join(f"{m[way].median * 1e3:9.3f}" for way in ("wire", "codec", "round"))
        codec, mean, wire = (column[str(rows)] for column in columns)
        print(f"{rows:13d} {ms} {codec:13.2f} {mean:14.2f} {wire:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="measured rounds of each kind (default 300)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128], help="rows per node")
    args = parser.parse_args()
    document: dict[str, Any] = {"width": WIDTH, "devices": DEVICES, "scheme": "int8"}
    with tempfile.TemporaryDirectory() as folder:
        make_run_keys(Path(folder), NAMES)
        for suffix, keys in (("", None), ("_curve", Path(folder))):
            measured = measure(keys, args.rows, args.rounds)
            print_table("on (CURVE)" if keys else "off", measured)
            for floor in ("codec", "wire"):
                document[f"ratio_to_{floor}_floor{suffix}"] = ratios(measured, floor, "median")
            document[f"mean_ratio_to_codec_floor{suffix}"] = ratios(measured, "codec", "mean")
            document[f"round_s{suffix}"] = {str(rows): m["round"].median for rows, m in measured.items()}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
