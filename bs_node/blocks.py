"""Group the kept pairs into one block of rows per device, and combine what came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from time import monotonic_ns

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.latency.estimator import Prediction
from testbed.native import native, read, write
from testbed.policies.base import DROPPED, FloatArray, IntArray
from testbed.runlog.schema import Status
from testbed.wire.quantization import accumulate

Float32 = NDArray[np.float32]
GROUPED = 0


@dataclass(frozen=True, slots=True)
class Block:
    """The rows one device computes in one round: ascending (expert, token).

    Row r is token token_R[r], of which it serves the gate's choice number choice_R[r].
    """

    device: int
    token_R: NDArray[np.int64]
    choice_R: NDArray[np.int64]
    segments: list[tuple[int, int]]  # [(expert, rows), ...]

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
    bs_sent_ns: int | None = None  # base station's clock: first part handed to the socket
    bs_received_ns: int | None = None  # base station's clock: last part of the reply read
    node_received_ns: int | None = None  # the node's clock
    node_sent_ns: int | None = None
    node_queue_ns: int | None = None
    node_dequantise_ns: int | None = None
    node_compute_ns: int | None = None  # the padding included
    node_padding_ns: int | None = None
    node_quantise_ns: int | None = None
    down_ns: int | None = None  # one way, as the comparison of the clocks has it
    up_ns: int | None = None
    clock_offset_ns: int | None = None  # the node's clock minus the base station's ...
    clock_bound_ns: int | None = None  # ... and the most by which that, and the one-way times, can be wrong
    predicted: Prediction | None = None  # what was expected of it, before it taught anything
    dilation: float = 1.0  # emulated time was stretched by it

    @property
    def stamps(self) -> tuple[int, int, int, int] | None:
        """BS sent, node received, node sent, BS received: each side's own clock. None unless all are known."""
        sent_ns, received_ns = self.bs_sent_ns, self.bs_received_ns
        node_received_ns, node_sent_ns = self.node_received_ns, self.node_sent_ns
        if sent_ns is None or node_received_ns is None or node_sent_ns is None or received_ns is None:
            return None
        return sent_ns, node_received_ns, node_sent_ns, received_ns

    @property
    def rtt_ns(self) -> int | None:
        if self.bs_sent_ns is None or self.bs_received_ns is None:
            return None
        return self.bs_received_ns - self.bs_sent_ns


def group(expert_TK: IntArray, device_TK: IntArray, devices: int, experts: int) -> list[Block]:
    """One block per device that has any kept pair, rows in ascending (expert, token).

    Raises ValueError for a kept pair whose device or expert does not exist.
    """
    token_P, choice_P = np.empty(device_TK.size, np.int64), np.empty(device_TK.size, np.int64)
    first_NE = np.zeros((devices, experts + 1), np.int64)
    wanted_TK, place_TK = np.ascontiguousarray(expert_TK, np.int64), np.ascontiguousarray(device_TK, np.int64)
    if _sort_pairs(wanted_TK, place_TK, first_NE, token_P, choice_P) != GROUPED:
        raise ValueError(f"a kept pair has no device below {devices} or no expert below {experts}")
    blocks = []
    for device, first_E in enumerate(first_NE.tolist()):
        first, last = first_E[0], first_E[experts]
        if last > first:
            segments = [(expert, after - at) for expert, (at, after) in enumerate(pairwise(first_E)) if after > at]
            blocks.append(Block(device, token_P[first:last], choice_P[first:last], segments))
    return blocks


@native(read(types.int64, 2), read(types.int64, 2), write(types.int64, 2), write(types.int64, 1), write(types.int64, 1))
def _sort_pairs(
    expert_TK: NDArray[np.int64],
    device_TK: NDArray[np.int64],
    first_NE: NDArray[np.int64],
    token_P: NDArray[np.int64],
    choice_P: NDArray[np.int64],
) -> int:
    """Counting sort of the kept pairs. Pair P of (device, expert) lies in first_NE[device, expert : expert + 2]."""
    devices, experts = first_NE.shape[0], first_NE.shape[1] - 1
    next_NE = np.zeros((devices, experts), np.int64)
    for token in range(device_TK.shape[0]):
        for choice in range(device_TK.shape[1]):
            device, expert = device_TK[token, choice], expert_TK[token, choice]
            if device != DROPPED:
                if not (0 <= device < devices and 0 <= expert < experts):
                    return 1
                next_NE[device, expert] += 1
    first = 0
    for device in range(devices):
        for expert in range(experts):
            first_NE[device, expert] = first
            first += next_NE[device, expert]
            next_NE[device, expert] = first_NE[device, expert]
        first_NE[device, experts] = first
    for token in range(device_TK.shape[0]):
        for choice in range(device_TK.shape[1]):
            device, expert = device_TK[token, choice], expert_TK[token, choice]
            if device != DROPPED:
                place = next_NE[device, expert]
                token_P[place], choice_P[place] = token, choice
                next_NE[device, expert] += 1
    return GROUPED


class Combiner:
    """out_TD = the weighted sum of the experts' outputs (Eq. 1), added up while replies still come.

    The order is always ascending (expert, token), whatever comes first: an output waits for those before it, so that
    the sum has the same bits in every run.
    """

    def __init__(self, blocks: Sequence[Block], weight_TK: FloatArray, out_TD: Float32) -> None:
        self.blocks, self._weight_TK, self.out_TD = blocks, weight_TK, out_TD
        self._output_of: dict[int, Float32] = {}  # device -> its rows
        self._ahead: list[tuple[int, Block, slice]] | None = None  # still to add, the next one last
        self.spent_ns = 0

    def take(self, outcome: Outcome) -> None:
        """An answered block: add what has become its turn."""
        started_ns = monotonic_ns()
        if outcome.output_RD is not None:
            self._output_of[outcome.block.device] = outcome.output_RD
            if self._ahead is None:
                self._ahead = pieces(self.blocks)[::-1]
            while self._ahead and (output_RD := self._output_of.get(self._ahead[-1][1].device)) is not None:
                _, block, rows = self._ahead.pop()
                self._add(block, rows, output_RD)
        self.spent_ns += monotonic_ns() - started_ns

    def _add(self, block: Block, rows: slice, output_RD: Float32) -> None:
        token_R = block.token_R[rows]
        weight_R = self._weight_TK[token_R, block.choice_R[rows]].astype(np.float32, copy=False)
        accumulate(output_RD[rows], weight_R, token_R, self.out_TD)


def pieces(blocks: Sequence[Block]) -> list[tuple[int, Block, slice]]:
    """(expert, block, its rows in the block), ascending by expert."""
    found: list[tuple[int, Block, slice]] = []
    for block in blocks:
        first = 0
        for expert, rows in block.segments:
            found.append((expert, block, slice(first, first + rows)))
            first += rows
    found.sort(key=itemgetter(0))
    return found


def combine(outcomes: Sequence[Outcome], weight_TK: FloatArray, out_TD: Float32) -> Float32:
    """The same sum over what there is, once it is known what there is: weight_TK are then the survivors'."""
    answered = [outcome for outcome in outcomes if outcome.output_RD is not None]
    combiner = Combiner([outcome.block for outcome in answered], weight_TK, out_TD)
    for outcome in answered:
        combiner.take(outcome)
    return out_TD


def arrived(outcomes: Sequence[Outcome], device_TK: IntArray) -> NDArray[np.bool_]:
    """arrived_TK: the pairs that were sent and whose output is there."""
    arrived_TK: NDArray[np.bool_] = device_TK != DROPPED
    for outcome in outcomes:
        if outcome.output_RD is None:
            arrived_TK[outcome.block.token_R, outcome.block.choice_R] = False
    return arrived_TK
