"""Group the kept pairs into one block of rows per device, and combine what came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from testbed.policies.base import DROPPED, FloatArray, IntArray
from testbed.runlog.schema import Status
from testbed.wire.quantization import accumulate

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Block:
    """The rows one device computes in one round: ascending (expert, token).

    Row r is token token_R[r], of which it serves the gate's choice number choice_R[r].
    """

    device: int
    token_R: NDArray[np.int64]
    choice_R: NDArray[np.int64]
    segments: list[list[int]]  # [[expert, rows], ...]

    @property
    def rows(self) -> int:
        return len(self.token_R)


@dataclass(slots=True)
class Outcome:
    """What became of one block. Times in nanoseconds, None where nothing was measured."""

    block: Block
    status: Status
    output_RD: Float32 | None = None  # valid until the device's next round
    bytes_down: int = 0
    bytes_up: int = 0
    parts_down: int = 0
    parts_up: int = 0
    send_ns: int = 0
    sent_ns: int | None = None  # base station's clock: first part handed to the socket
    received_ns: int | None = None  # base station's clock: last part of the reply read
    node_received_ns: int | None = None  # the node's clock
    node_sent_ns: int | None = None
    node_queue_ns: int | None = None
    node_dequantise_ns: int | None = None
    node_compute_ns: int | None = None
    node_padding_ns: int | None = None
    node_quantise_ns: int | None = None

    @property
    def rtt_ns(self) -> int | None:
        if self.sent_ns is None or self.received_ns is None:
            return None
        return self.received_ns - self.sent_ns


def group(expert_TK: IntArray, device_TK: IntArray, experts: int) -> list[Block]:
    """One block per device that has any kept pair, rows in ascending (expert, token)."""
    token_P, choice_P = np.nonzero(device_TK != DROPPED)
    if len(token_P) == 0:
        return []
    expert_P = expert_TK[token_P, choice_P]
    place_P = device_TK[token_P, choice_P] * np.int64(experts) + expert_P  # one number per (device, expert)
    order_P = np.argsort(place_P, kind="stable")
    token_P, choice_P, place_P = token_P[order_P], choice_P[order_P], place_P[order_P]
    starts = [0, *(np.flatnonzero(place_P[1:] != place_P[:-1]) + 1).tolist(), len(place_P)]
    segments_of: dict[int, list[list[int]]] = {}
    for first, last in pairwise(starts):
        device, expert = divmod(int(place_P[first]), experts)
        segments_of.setdefault(device, []).append([expert, last - first])
    blocks: list[Block] = []
    first = 0
    for device, segments in segments_of.items():
        last = first + sum(rows for _, rows in segments)
        blocks.append(Block(device, token_P[first:last], choice_P[first:last], segments))
        first = last
    return blocks


def combine(outcomes: Sequence[Outcome], weight_TK: FloatArray, out_TD: Float32) -> None:
    """out_TD += the weighted sum of the experts' outputs (Eq. 1), ascending (expert, token) whatever came first."""
    pieces: list[tuple[int, Outcome, slice]] = []
    for outcome in outcomes:
        first = 0
        for expert, rows in outcome.block.segments:
            pieces.append((expert, outcome, slice(first, first + rows)))
            first += rows
    for _, outcome, rows_ in sorted(pieces, key=lambda piece: piece[0]):
        if outcome.output_RD is None:
            continue
        token_R, choice_R = outcome.block.token_R[rows_], outcome.block.choice_R[rows_]
        weight_R = weight_TK[token_R, choice_R].astype(np.float32, copy=False)
        accumulate(outcome.output_RD[rows_], weight_R, token_R, out_TD)


def arrived(outcomes: Sequence[Outcome], device_TK: IntArray) -> NDArray[np.bool_]:
    """arrived_TK: the pairs that were sent and whose output is there."""
    arrived_TK: NDArray[np.bool_] = device_TK != DROPPED
    for outcome in outcomes:
        if outcome.output_RD is None:
            arrived_TK[outcome.block.token_R, outcome.block.choice_R] = False
    return arrived_TK
