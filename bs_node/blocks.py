"""Group the kept pairs into one block of rows per device, and combine what came back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from time import monotonic_ns
from typing import NamedTuple, Protocol

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import native, read, write
from testbed.policies.base import DROPPED, FloatArray, IntArray
from testbed.runlog.schema import Status
from testbed.wire.quantization import accumulate

Float32 = NDArray[np.float32]
REFUSED = -1
NOT_STAGED = -1  # as the log writes unknown: on a CPU it is so in every round


class Block(NamedTuple):
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


class Output(Protocol):
    """The rows that a device computed, R of them in the order of its block."""

    def accumulate(self, rows: slice, weight_R: Float32, token_R: NDArray[np.int64], out_TD: Float32) -> None:
        """Add `rows` of them to rows token_R of out_TD, times weight_R, in their order."""


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows as plain fp32: what was computed in this process."""

    y_RD: Float32

    def accumulate(self, rows: slice, weight_R: Float32, token_R: NDArray[np.int64], out_TD: Float32) -> None:
        accumulate(self.y_RD[rows], weight_R, token_R, out_TD)


@dataclass(slots=True)
class Outcome:
    """What became of one block. Times in nanoseconds, None where nothing was measured."""

    block: Block
    status: Status
    output: Output | None = None
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
    node_staging_ns: int = NOT_STAGED
    node_quantise_ns: int | None = None
    down_ns: int | None = None  # one way, as the comparison of the clocks has it
    up_ns: int | None = None
    clock_offset_ns: int | None = None  # the node's clock minus the base station's ...
    clock_bound_ns: int | None = None  # ... and the most by which that, and the one-way times, can be wrong
    predicted: Sequence[float] | None = None  # what was expected of it in s: compute, down, up
    dilation: float = 1.0  # emulated time was stretched by it
    air_ratio: tuple[float, ...] = (1.0, 1.0)  # how many times the even split's rate it had, down and up

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
    segment_S3 = np.empty((min(device_TK.size, devices * experts), 3), np.int64)
    wanted_TK, place_TK = np.ascontiguousarray(expert_TK, np.int64), np.ascontiguousarray(device_TK, np.int64)
    found = _sort_pairs(wanted_TK, place_TK, devices, experts, segment_S3, token_P, choice_P)
    if found == REFUSED:
        raise ValueError(f"a kept pair has no device below {devices} or no expert below {experts}")
    blocks: list[Block] = []
    first, last, before = 0, 0, DROPPED
    for device, expert, rows in segment_S3[:found].tolist():
        if device == before:
            segments = [*blocks.pop().segments, (expert, rows)]
        else:
            segments, first, before = [(expert, rows)], last, device
        last += rows
        blocks.append(Block(device, token_P[first:last], choice_P[first:last], segments))
    return blocks


@native(
    read(types.int64, 2), read(types.int64, 2), types.int64, types.int64,
    write(types.int64, 2), write(types.int64, 1), write(types.int64, 1),
)  # fmt: skip
def _sort_pairs(
    expert_TK: NDArray[np.int64],
    device_TK: NDArray[np.int64],
    devices: int,
    experts: int,
    segment_S3: NDArray[np.int64],
    token_P: NDArray[np.int64],
    choice_P: NDArray[np.int64],
) -> int:
    """Counting sort of the kept pairs by (device, expert): segment_S3 (device, expert, rows) ascending; answers how
    many there are, or REFUSED."""
    next_NE = np.zeros((devices, experts), np.int64)
    for token in range(device_TK.shape[0]):
        for choice in range(device_TK.shape[1]):
            device, expert = device_TK[token, choice], expert_TK[token, choice]
            if device != DROPPED:
                if not (0 <= device < devices and 0 <= expert < experts):
                    return REFUSED
                next_NE[device, expert] += 1
    first, found = 0, 0
    for device in range(devices):
        for expert in range(experts):
            rows = next_NE[device, expert]
            next_NE[device, expert] = first
            if rows > 0:
                segment_S3[found, 0], segment_S3[found, 1], segment_S3[found, 2] = device, expert, rows
                first, found = first + rows, found + 1
    for token in range(device_TK.shape[0]):
        for choice in range(device_TK.shape[1]):
            device, expert = device_TK[token, choice], expert_TK[token, choice]
            if device != DROPPED:
                place = next_NE[device, expert]
                token_P[place], choice_P[place] = token, choice
                next_NE[device, expert] += 1
    return found


class Piece(NamedTuple):
    """The rows of one expert on one device, and what they are added to."""

    expert: int
    device: int
    rows: slice  # of the device's block
    weight_R: Float32
    token_R: NDArray[np.int64]


class Combiner:
    """out_TD = the weighted sum of the experts' outputs (Eq. 1), added up while replies still come.

    The order is always ascending (expert, token), whatever comes first: an output waits for those before it, so that
    the sum has the same bits in every run.
    """

    def __init__(self, blocks: Sequence[Block], weight_TK: FloatArray, zeros: Callable[[], Float32]) -> None:
        """`zeros` makes room for the sum: a megabyte for 64 tokens of Mixtral's."""
        self.blocks, self._weight_TK, self._zeros = blocks, weight_TK, zeros
        self._output_of: dict[int, Output] = {}  # device -> its rows
        self._prepared: tuple[list[Piece], Float32] | None = None
        self.spent_ns = 0

    def prepare(self) -> tuple[list[Piece], Float32]:
        """What is still to add, the next piece last, and to what: made while the nodes work on the first answer."""
        if self._prepared is None:
            started_ns = monotonic_ns()
            self._prepared = pieces(self.blocks, self._weight_TK)[::-1], self._zeros()
            self.spent_ns += monotonic_ns() - started_ns
        return self._prepared

    @property
    def out_TD(self) -> Float32:
        """The sum, of what has come until now."""
        return self.prepare()[1]

    def take(self, outcome: Outcome) -> None:
        """An answered block: add what has become its turn."""
        (ahead, out_TD), started_ns = self.prepare(), monotonic_ns()
        if outcome.output is not None:
            self._output_of[outcome.block.device] = outcome.output
            while ahead and (output := self._output_of.get(ahead[-1].device)) is not None:
                piece = ahead.pop()
                output.accumulate(piece.rows, piece.weight_R, piece.token_R, out_TD)
        self.spent_ns += monotonic_ns() - started_ns


def pieces(blocks: Sequence[Block], weight_TK: FloatArray) -> list[Piece]:
    """Ascending by expert, and of one expert by device. The weights of all rows are gathered at once."""
    found: list[Piece] = []
    if not blocks:
        return found
    token_P = np.concatenate([block.token_R for block in blocks])
    choice_P = np.concatenate([block.choice_R for block in blocks])
    weight_P = weight_TK[token_P, choice_P].astype(np.float32, copy=False)
    before = 0  # rows of earlier blocks
    for block in blocks:
        first = 0
        for expert, rows in block.segments:
            mine, of_all = slice(first, first + rows), slice(before + first, before + first + rows)
            found.append(Piece(expert, block.device, mine, weight_P[of_all], block.token_R[mine]))
            first += rows
        before += first
    found.sort(key=itemgetter(0))
    return found


def combine(outcomes: Sequence[Outcome], weight_TK: FloatArray, out_TD: Float32) -> Float32:
    """The same sum over what there is, once it is known what there is: weight_TK are then the survivors'."""
    answered = [outcome for outcome in outcomes if outcome.output is not None]
    combiner = Combiner([outcome.block for outcome in answered], weight_TK, lambda: out_TD)
    for outcome in answered:
        combiner.take(outcome)
    return out_TD


def arrived(outcomes: Sequence[Outcome], device_TK: IntArray) -> NDArray[np.bool_]:
    """arrived_TK: the pairs that were sent and whose output is there."""
    arrived_TK: NDArray[np.bool_] = device_TK != DROPPED
    for block in [outcome.block for outcome in outcomes if outcome.output is None]:
        arrived_TK[block.token_R, block.choice_R] = False
    return arrived_TK
