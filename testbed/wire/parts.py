"""Blocks of rows travel as numbered parts of at most 64 KiB, and are put together again before computing.

Rows are never split. ZeroMQ's heartbeats count only complete messages, so a single large message on a slow link
would look like a dead peer; parts keep every link talking.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from testbed.errors import MessageError
from testbed.wire.kept import KeptRows
from testbed.wire.messages import ReplyPart, RequestPart
from testbed.wire.quantization import SCHEMES, dequantise

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


class Assembler:
    """Collects the parts of one block into rows of fp32.

    The first part fixes what the others must say, all but their number. Memory is taken only after its claim was
    checked against `max_bytes`. Parts may come in any order; a repeated or contradicting part raises MessageError.
    """

    def __init__(
        self, first: RequestPart | ReplyPart, room: KeptRows[np.float32], max_bytes: int = MAX_BLOCK_BYTES
    ) -> None:
        if first.rows * first.width * 4 > max_bytes:
            raise MessageError(f"block of {first.rows} x {first.width} values is above the limit of {max_bytes} bytes")
        if first.padded_width < first.width:
            raise MessageError(f"rows of {first.width} values cannot be filled up to {first.padded_width}")
        if part_rows(first.rows, first.parts, first.parts - 1).start >= first.rows:
            raise MessageError(f"{first.rows} rows do not travel in {first.parts} parts")
        self._first = first
        self._scheme = SCHEMES[first.scheme]
        self.block_RD = room.take(first.rows, first.width)
        self.payload_bytes, self.total_bytes = 0, self._scheme.payload_bytes(first.rows, first.padded_width)
        self._arrived, self._missing = bytearray(first.parts), first.parts

    def add(self, part: RequestPart | ReplyPart, payload: bytes | memoryview) -> bool:
        """Dequantise one part into its place. True when the block is complete."""
        first, number = self._first, part.part
        if part is not first and replace(part, part=first.part) != first:
            raise MessageError(f"part {number} contradicts the first part of its block")
        if number >= first.parts or self._arrived[number]:
            raise MessageError(f"part {number} of {first.parts} came twice or does not exist")
        place = part_rows(first.rows, first.parts, number)
        count, block_RD = place.stop - place.start, self.block_RD[place]
        dequantise(payload, count, first.width, self._scheme, block_RD, first.padded_width)
        self._arrived[number] = 1
        self._missing -= 1
        self.payload_bytes += len(payload)
        return self._missing == 0
