"""The two floors of an expert round: what eight nodes on loopback cannot do without.

wire    a round's messages there and back on the same sockets, no arithmetic at all
codec   the same with quantise, gather, dequantise and combine at both ends on kept buffers, and nothing else
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from testbed.wire.kept import KeptRows
from testbed.wire.keys import enrolled_nodes, read_pair, read_public
from testbed.wire.quantization import SCHEMES, accumulate, dequantise, quantise
from testbed.wire.sockets import AllowList, NodeSocket, StationSocket

DEVICES, EXPERTS, TOP_K, WIDTH = 8, 8, 2, 4096
NAMES = [f"node-{i}" for i in range(DEVICES)]
INT8 = SCHEMES["int8"]
HEADER = bytes(80)
PART_ROWS = 65536 // WIDTH  # of int8: no part has more than 64 KiB of values
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
