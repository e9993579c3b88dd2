"""Blocks of rows travel as numbered parts of at most 64 KiB, and are put together again before computing.

Rows are never split. ZeroMQ's heartbeats count only complete messages, so a single large message on a slow link
would look like a dead peer; parts keep every link talking.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from testbed.errors import MessageError
from testbed.wire.kept import KeptRows
from testbed.wire.messages import ReplyPart, RequestPart
from testbed.wire.quantization import SCHEMES, Scheme, accumulate, dequantise, received

MAX_BLOCK_BYTES = 2**30


def part_count(rows: int, value_bytes_per_row: int, part_bytes: int) -> int:
    """How many parts a block of `rows` travels in, each of whole rows.

    A part of more than one row has at most `part_bytes` of values; the scales of int8, 4 bytes a row, come on top, so
    that sixteen rows of 4096 are one part of 64 KiB and not two.
    """
    rows_per_part = max(1, part_bytes // value_bytes_per_row)
    return -(-rows // rows_per_part)


def part_rows(rows: int, parts: int, part: int) -> slice:
    """The rows that one part carries: both sides compute it, so it need not travel."""
    size = -(-rows // parts)
    return slice(part * size, min((part + 1) * size, rows))


def check_claim(part: RequestPart | ReplyPart, max_bytes: int = MAX_BLOCK_BYTES) -> None:
    """Raises MessageError for a block that is not to be: before any memory is taken for it."""
    if part.rows * part.width * 4 > max_bytes:
        raise MessageError(f"block of {part.rows} x {part.width} values is above the limit of {max_bytes} bytes")
    if part.padded_width < part.width:
        raise MessageError(f"rows of {part.width} values cannot be filled up to {part.padded_width}")
    if part.part >= part.parts:
        raise MessageError(f"part {part.part} of {part.parts} does not exist")


def whole_block(
    only: RequestPart | ReplyPart, payload: bytes | memoryview, room: KeptRows[np.float32], max_bytes: int
) -> NDArray[np.float32]:
    """The rows of a block that travelled in one part, as most do. Raises MessageError as an `Assembler` does."""
    check_claim(only, max_bytes)
    block_RD = room.take(only.rows, only.width)
    dequantise(payload, only.rows, only.width, SCHEMES[only.scheme], block_RD, only.padded_width)
    return block_RD


class EncodedRows(NamedTuple):
    """The rows of a block as they travelled, checked: decoded while they are added up."""

    encoded_R: NDArray[Any]
    scheme: Scheme

    def accumulate(
        self, rows: slice, weight_R: NDArray[np.float32], token_R: NDArray[np.int64], out_TD: NDArray[np.float32]
    ) -> None:
        """Add `rows` of them to rows token_R of `out_TD`, times weight_R (Eq. 1), in their order."""
        accumulate(self.encoded_R[rows], weight_R, token_R, out_TD, self.scheme)


def whole_reply(only: ReplyPart, payload: bytes | memoryview) -> EncodedRows:
    """The rows of a reply that travelled in one part, as most do. Raises MessageError as `ReceivedRows` does."""
    check_claim(only)
    scheme = SCHEMES[only.scheme]
    return EncodedRows(received(payload, only.rows, only.width, scheme, only.padded_width), scheme)


class Parts:
    """Which parts of one block have come. The first part fixes what the others must say, all but their number.

    Parts may come in any order; a repeated or contradicting one raises MessageError. A claim is checked against
    `max_bytes` before memory is taken for it.
    """

    def __init__(self, first: RequestPart | ReplyPart, max_bytes: int = MAX_BLOCK_BYTES) -> None:
        check_claim(first, max_bytes)
        if first.parts > 1 and part_rows(first.rows, first.parts, first.parts - 1).start >= first.rows:
            raise MessageError(f"{first.rows} rows do not travel in {first.parts} parts")
        self.first, self.scheme = first, SCHEMES[first.scheme]
        self.payload_bytes, self.total_bytes = 0, self.scheme.payload_bytes(first.rows, first.padded_width)
        self._arrived, self._missing = bytearray(first.parts), first.parts

    def _place(self, part: RequestPart | ReplyPart) -> slice:
        """The rows that this part brings. Raises MessageError for one that does not belong here."""
        first, number = self.first, part.part
        if part is not first and replace(part, part=first.part) != first:
            raise MessageError(f"part {number} contradicts the first part of its block")
        if number >= first.parts or self._arrived[number]:
            raise MessageError(f"part {number} of {first.parts} came twice or does not exist")
        return part_rows(first.rows, first.parts, number)

    def _arrives(self, part: RequestPart | ReplyPart, payload: bytes | memoryview) -> bool:
        """True when the block is complete."""
        self._arrived[part.part] = 1
        self._missing -= 1
        self.payload_bytes += len(payload)
        return self._missing == 0


class Assembler(Parts):
    """Collects the parts of one block into rows of fp32 at once, in `room`."""

    def __init__(
        self, first: RequestPart | ReplyPart, room: KeptRows[np.float32], max_bytes: int = MAX_BLOCK_BYTES
    ) -> None:
        super().__init__(first, max_bytes)
        self.block_RD = room.take(first.rows, first.width)

    def add(self, part: RequestPart | ReplyPart, payload: bytes | memoryview) -> bool:
        """Dequantise one part into its place. True when the block is complete."""
        first, rows = self.first, self._place(part)
        block_RD = self.block_RD[rows]
        dequantise(payload, len(block_RD), first.width, self.scheme, block_RD, first.padded_width)
        return self._arrives(part, payload)


class ReceivedRows(Parts):
    """Collects the parts of one block as they travelled, checked, and decodes them while they are added up.

    So the rows of a large block are written and read once, not twice, and each while it is in the cache.
    """

    def __init__(self, first: RequestPart | ReplyPart) -> None:
        super().__init__(first)
        self._encoded: list[NDArray[Any] | None] = [None] * first.parts

    def add(self, part: RequestPart | ReplyPart, payload: bytes | memoryview) -> bool:
        """Keep one part. True when the block is complete."""
        first, rows = self.first, self._place(part)
        count = rows.stop - rows.start
        self._encoded[part.part] = received(payload, count, first.width, self.scheme, first.padded_width)
        return self._arrives(part, payload)

    def accumulate(
        self, rows: slice, weight_R: NDArray[np.float32], token_R: NDArray[np.int64], out_TD: NDArray[np.float32]
    ) -> None:
        """Add `rows` of the complete block to rows token_R of `out_TD`, times weight_R (Eq. 1), in their order."""
        first = self.first
        for number, encoded_R in enumerate(self._encoded):
            part = part_rows(first.rows, first.parts, number)
            begin, end = max(part.start, rows.start), min(part.stop, rows.stop)
            if begin < end and encoded_R is not None:
                mine, theirs = slice(begin - rows.start, end - rows.start), slice(begin - part.start, end - part.start)
                accumulate(encoded_R[theirs], weight_R[mine], token_R[mine], out_TD, self.scheme)
