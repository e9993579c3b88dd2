"""What one expert round costs beside what it cannot do without: eight nodes on loopback, int8 rows of 4096 values.

Three ways are measured in turns of 30 rounds in one run, with encryption off and on:

    wire    the same messages there and back on the same sockets, no arithmetic at all
    codec   the same with quantise, gather, dequantise and combine at both ends on kept buffers, and nothing else
    round   ours: select, group, quantise, send, check, dequantise, (echo), quantise, reply, check, combine, record

All three send parts of at most 64 KiB of values, as the wire format demands: 128 rows are eight messages each way.
The experts echo their rows, so that no FFN hides the cost. Ratios count: the machine's speed cancels.
The last line is one JSON document.

    python benchmarks/layer_round.py --rounds 300
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from testbed.collector import keep_what_is_loaded
from testbed.wire.kept import KeptRows
from testbed.wire.keys import enrolled_nodes, make_run_keys, read_pair, read_public
from testbed.wire.quantization import SCHEMES, accumulate, dequantise, quantise
from testbed.wire.sockets import AllowList, NodeSocket, StationSocket

DEVICES, EXPERTS, TOP_K, WIDTH = 8, 8, 2, 4096
NAMES = [f"node-{i}" for i in range(DEVICES)]
INT8 = SCHEMES["int8"]
HEADER = bytes(80)
PART_ROWS = 65536 // WIDTH  # of int8: no part has more than 64 KiB of values
ROUNDS_PER_TURN = 30  # as the layers of a model follow one another
CONTEXT = multiprocessing.get_context("forkserver")


def node_socket(port: int, name: str, keys: Path | None) -> NodeSocket:
    endpoint = f"tcp://127.0.0.1:{port}"
    if keys is None:
        return NodeSocket(endpoint, None, None)
    return NodeSocket(endpoint, read_pair(keys / name, name), read_public(keys / name / "bs.pub"))


def wire_node(port: int, name: str, keys: Path | None) -> None:
    """Echo messages until a single frame comes."""
    sockets = node_socket(port, name, keys)
    sockets.socket.send(name.encode())
    while len(frames := sockets.socket.recv_multipart(copy=False)) > 1:
        sockets.socket.send_multipart(frames, copy=False)
    sockets.close()


def codec_node(port: int, name: str, keys: Path | None) -> None:
    """Dequantise a block, quantise it, send it back, until a single frame comes."""
    sockets, received, quantised = node_socket(port, name, keys), KeptRows(np.float32), KeptRows(np.uint8)
    sockets.socket.send(name.encode())
    arrived = 0
    while len(frames := sockets.socket.recv_multipart(copy=False)) > 1:
        rows = int.from_bytes(frames[0].buffer[:4], "little")
        rows_RD, part = received.take(rows, WIDTH), len(frames[1].buffer) // INT8.row_bytes(WIDTH)
        dequantise(frames[1].buffer, part, WIDTH, INT8, rows_RD[arrived : arrived + part])
        arrived += part
        if arrived == rows:
            arrived, rows_RB = 0, quantise(rows_RD, INT8, quantised)
            for first in range(0, rows, PART_ROWS):
                sockets.socket.send_multipart([HEADER, rows_RB[first : first + PART_ROWS]])
    sockets.close()


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


def routing(tokens: int) -> tuple[Any, Any, Any]:
    """Every expert gets the same number of rows: hidden_TD, expert_TK, weight_TK."""
    rng = np.random.default_rng(0)
    token_T = np.arange(tokens)
    hidden_TD = rng.standard_normal((tokens, WIDTH), dtype=np.float32)
    expert_TK = np.stack([token_T % EXPERTS, (token_T + EXPERTS // 2) % EXPERTS], axis=1)
    return hidden_TD, expert_TK, rng.dirichlet((1.0, 1.0), tokens).astype(np.float32)


def open_station(stack: ExitStack, keys: Path | None, target: Callable[..., None]) -> StationSocket:
    if keys is None:
        sockets = StationSocket("127.0.0.1", 0, None, None)
    else:
        sockets = StationSocket("127.0.0.1", 0, read_pair(keys / "bs", "bs"), AllowList(enrolled_nodes(keys / "bs")))
    stack.callback(sockets.close)
    for name in NAMES:
        process = CONTEXT.Process(target=target, args=(sockets.port, name, keys), daemon=True)
        process.start()
        stack.callback(process.kill)
    return sockets


def routing_ids(sockets: StationSocket) -> list[bytes]:
    ids: dict[bytes, bytes] = {}
    while len(ids) < DEVICES:
        routing_id, name = sockets.socket.recv_multipart()
        ids[name] = routing_id
    return [ids[name.encode()] for name in NAMES]


def wire_round(stack: ExitStack, keys: Path | None) -> Callable[[int], None]:
    sockets = open_station(stack, keys, wire_node)
    ids = routing_ids(sockets)

    def one(rows: int) -> None:
        parts = [bytes(INT8.payload_bytes(len(part), WIDTH)) for part in part_slices(rows)]
        for routing_id in ids:
            for payload in parts:
                sockets.socket.send_multipart([routing_id, HEADER, payload], copy=False)
        for _ in range(len(ids) * len(parts)):
            sockets.socket.recv_multipart(copy=False)

    return one


def part_slices(rows: int) -> list[range]:
    """The rows of each part, as the wire format cuts them."""
    return [range(rows)[first : first + PART_ROWS] for first in range(0, rows, PART_ROWS)]


def codec_round(stack: ExitStack, keys: Path | None) -> Callable[[int], None]:
    sockets = open_station(stack, keys, codec_node)
    ids, quantised = routing_ids(sockets), KeptRows(np.uint8)
    prepared: dict[int, CodecBuffers] = {}

    def one(rows: int) -> None:
        if rows not in prepared:
            prepared[rows] = CodecBuffers(rows)
        kept = prepared[rows]
        header = rows.to_bytes(4, "little") + HEADER[4:]
        rows_TB = quantise(kept.hidden_TD, INT8, quantised)
        for token_R, routing_id in zip(kept.token_of_N, ids, strict=True):
            for part in part_slices(rows):
                payload_RB = kept.payload_RB[: len(part)]
                np.take(rows_TB, token_R[part.start : part.stop], 0, payload_RB, "clip")
                sockets.socket.send_multipart([routing_id, header, payload_RB])
        kept.out_TD[:] = 0
        arrived = dict.fromkeys(ids, 0)
        for _ in range(len(ids) * len(part_slices(rows))):
            frames = sockets.socket.recv_multipart(copy=False)
            routing_id, count = frames[0].bytes, len(frames[2].buffer) // INT8.row_bytes(WIDTH)
            place = slice(arrived[routing_id], arrived[routing_id] + count)
            arrived[routing_id] = place.stop
            device, reply_RD = ids.index(routing_id), kept.reply_RD[:count]
            dequantise(frames[2].buffer, count, WIDTH, INT8, reply_RD)
            accumulate(reply_RD, kept.weight_of_N[device][place], kept.token_of_N[device][place], kept.out_TD)

    return one


class CodecBuffers:
    """What the codec floor needs, made before it is measured."""

    def __init__(self, rows: int) -> None:
        self.hidden_TD, expert_TK, weight_TK = routing(rows * DEVICES // TOP_K)
        places = [np.nonzero(expert_TK == expert) for expert in range(EXPERTS)]
        self.token_of_N = [np.ascontiguousarray(token) for token, _ in places]
        self.weight_of_N = [np.ascontiguousarray(weight_TK[place]) for place in places]
        self.payload_RB = np.empty((PART_ROWS, INT8.row_bytes(WIDTH)), np.uint8)
        self.reply_RD = np.empty((PART_ROWS, WIDTH), np.float32)
        self.out_TD = np.empty_like(self.hidden_TD)


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


def measure(keys: Path | None, rows_list: Sequence[int], rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds of each way and row count, the ways taking turns."""
    with ExitStack() as stack:
        ways = {"wire": wire_round(stack, keys), "codec": codec_round(stack, keys), "round": our_round(stack, keys)}
        medians: dict[int, dict[str, float]] = {}
        for rows in rows_list:
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(-(-rounds // ROUNDS_PER_TURN) + 1):
                for way, one in ways.items():
                    seconds = [timed(one, rows) for _ in range(ROUNDS_PER_TURN)]
                    taken[way] += seconds if turn else []  # the first turn warms up
            medians[rows] = {way: statistics.median(seconds) for way, seconds in taken.items()}
        return medians


def timed(one: Callable[[int], None], rows: int) -> float:
    started = time.perf_counter()
    one(rows)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="measured rounds of each kind (default 300)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128], help="rows per node")
    args = parser.parse_args()
    document: dict[str, Any] = {"width": WIDTH, "devices": DEVICES, "scheme": "int8"}
    with tempfile.TemporaryDirectory() as folder:
        make_run_keys(Path(folder), NAMES)
        for suffix, keys in (("", None), ("_curve", Path(folder))):
            medians = measure(keys, args.rows, args.rounds)
            print(f"\nencryption {'on (CURVE)' if keys else 'off'}: median ms of a round, eight nodes")
            print("rows per node      wire     codec     round   round/codec   round/wire")
            for rows, m in medians.items():
                ms = [f"{m[way] * 1e3:9.3f}" for way in ("wire", "codec", "round")]
                print(f"{rows:13d} {' '.join(ms)} {m['round'] / m['codec']:13.2f} {m['round'] / m['wire']:12.2f}")
            for floor in ("codec", "wire"):
                ratios = {str(rows): round(m["round"] / m[floor], 3) for rows, m in medians.items()}
                document[f"ratio_to_{floor}_floor{suffix}"] = ratios
            document[f"round_s{suffix}"] = {str(rows): m["round"] for rows, m in medians.items()}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
