"""Blocks of rows travel as numbered parts of at most 64 KiB, and are put together again before computing.

Rows are never split. ZeroMQ's heartbeats count only complete messages, so a single large message on a slow link
would look like a dead peer; parts keep every link talking.
"""

from __future__ import annotations

from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from testbed.errors import MessageError
from testbed.wire.messages import ReplyPart, RequestPart
from testbed.wire.quantization import SCHEMES, unpack

MAX_BLOCK_BYTES = 2**30
_SAID_OF_BLOCK = {  # all that the parts of one block must agree on
    kind: attrgetter(*(name for name in kind._fields if name != "part")) for kind in (RequestPart, ReplyPart)
}


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


class KeptRows:
    """Room for one block, kept from block to block, so that a large one does not cost fresh pages each time."""

    def __init__(self) -> None:
        self._flat: NDArray[np.float32] = np.empty(0, np.float32)

    def take(self, rows: int, width: int) -> NDArray[np.float32]:
        """Rows to write to; what was taken before is no longer valid."""
        if self._flat.size < rows * width:
            self._flat = np.empty(rows * width, np.float32)
        return self._flat[: rows * width].reshape(rows, width)


class Assembler:
    """Collects the parts of one block into rows of fp32.

    The first part fixes what the others must say, all but their number. Memory is taken only after its claim was
    checked against `max_bytes`. Parts may come in any order; a repeated or contradicting part raises MessageError.
    """

    def __init__(self, first: RequestPart | ReplyPart, room: KeptRows, max_bytes: int = MAX_BLOCK_BYTES) -> None:
        if first.rows * first.width * 4 > max_bytes:
            raise MessageError(f"block of {first.rows} x {first.width} values is above the limit of {max_bytes} bytes")
        if part_rows(first.rows, first.parts, first.parts - 1).start >= first.rows:
            raise MessageError(f"{first.rows} rows do not travel in {first.parts} parts")
        self.rows, self.width, self.parts = first.rows, first.width, first.parts
        self.scheme = SCHEMES[first.scheme]
        self.block_RD = room.take(first.rows, first.width)
        self._said = _SAID_OF_BLOCK[type(first)](first)
        self.payload_bytes, self.total_bytes = 0, self.scheme.payload_bytes(first.rows, first.width)
        self._missing = set(range(first.parts))

    def add(self, part: RequestPart | ReplyPart, payload: bytes | memoryview) -> bool:
        """Dequantise one part into its place. True when the block is complete."""
        if _SAID_OF_BLOCK[type(part)](part) != self._said:
            raise MessageError(f"part {part.part} contradicts the first part of its block")
        if part.part not in self._missing:
            raise MessageError(f"part {part.part} of {part.parts} came twice or does not exist")
        place = part_rows(self.rows, self.parts, part.part)
        unpack(payload, place.stop - place.start, self.width, self.scheme, self.block_RD[place])
        self._missing.remove(part.part)
        self.payload_bytes += len(payload)
        return not self._missing
