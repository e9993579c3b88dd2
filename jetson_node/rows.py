"""The node's own rows, one per block, on its own disk: what it saw of a reply that got lost is not lost.

Keeping them never stops a node from serving: what finds no room is counted, and said once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from testbed.errors import RunLogError
from testbed.runlog.node_rows import DTYPE, UNKNOWN_NS, NodeSegment, is_written
from testbed.runlog.schema import SEGMENT, Reply
from testbed.wire.messages import ReplyPart, RequestPart

ROWS_PER_FILE = 8192  # 1 MB: making a file takes milliseconds, so it must be rare
TOTAL_BYTES = 256 * 2**20  # of all files in a folder
REST_NS = 1_000_000_000  # without a block: only then may the loop wait for its disk
RETRY_NS = 10_000_000_000
_COMPUTED = int(Reply.COMPUTED)
NOT_KEPT = "rows_not_kept_bytes"  # figure of a heartbeat


class Rows:
    """What a worker tells of its blocks. This one keeps nothing."""

    def computed(
        self, reply: ReplyPart, request: RequestPart, complete_ns: int, bytes_down: int, bytes_up: int
    ) -> None:
        """A block was computed; its reply, whose first header this is, will be sent now. Bytes are of payloads."""

    def sent(self) -> None:
        """That reply was handed to the socket whole."""

    def refused(self, part: RequestPart) -> None:
        """The block of this part will not be computed."""

    def rest(self) -> None:
        """Nothing has come for a moment."""

    def figures(self) -> dict[str, float | None]:
        """For heartbeats: empty while all is well."""
        return {}

    def close(self) -> None:
        """No rows will follow."""


class RowFiles(Rows):
    """Keeps rows in files of `folder`, which it makes; beyond `total_bytes` the oldest files there are removed."""

    def __init__(
        self,
        folder: Path,
        device: str,
        boot_id: int,
        *,
        rows_per_file: int = ROWS_PER_FILE,
        total_bytes: int = TOTAL_BYTES,
    ) -> None:
        self._folder, self._device, self._boot_id = folder, device, boot_id
        self._rows_per_file, self._total_bytes = rows_per_file, total_bytes
        self._segment: NodeSegment | None = None
        self._files = self.not_kept = self._uncounted = 0
        self._has_room = self._said = False
        self._retry_ns = self._last_ns = 0
        self._begin_file()

    def computed(
        self, reply: ReplyPart, request: RequestPart, complete_ns: int, bytes_down: int, bytes_up: int
    ) -> None:
        self._last_ns = reply.sent_ns
        self._keep(
            reply.run, reply.round, reply.received_ns, reply.sent_ns, complete_ns, reply.queue_ns, reply.dequantise_ns,
            reply.compute_ns + reply.padding_ns, reply.padding_ns, reply.quantise_ns, bytes_down, bytes_up,
            reply.rows, reply.width, reply.attempt, request.layer, len(request.segments), _COMPUTED,
        )  # fmt: skip

    def sent(self) -> None:
        if self._has_room and self._segment is not None:
            self._segment.sent()

    def refused(self, part: RequestPart) -> None:
        unknown = [UNKNOWN_NS] * 8
        counts = part.rows, part.width, part.attempt, part.layer, len(part.segments)
        self._keep(part.run, part.round, *unknown, 0, 0, *counts, Reply.REFUSED)

    def rest(self) -> None:
        """Once a second has gone by without a block, rows go to the disk; before, the kernel does it when it likes."""
        if self._segment is not None and time.monotonic_ns() - self._last_ns > REST_NS:
            try:
                self._segment.flush()
            except OSError as error:
                self._say(f"{self._segment.path}: not brought to the disk ({error.strerror})")

    def figures(self) -> dict[str, float | None]:
        return {NOT_KEPT: self.not_kept * DTYPE.itemsize} if self.not_kept else {}

    def close(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _keep(self, *row: int) -> None:
        segment = self._segment
        if segment is None or segment.used == segment.capacity:
            segment = self._begin_file()
        self._has_room = segment is not None
        if segment is not None:
            segment.append(*row)
        else:
            self.not_kept += 1
            self._uncounted += 1
            self._count()

    def _count(self) -> None:
        """Into the newest file, as soon as there is one."""
        if self._segment is not None and self._uncounted:
            self._segment.count_lost(self._uncounted)
            self._uncounted = 0

    def _begin_file(self) -> NodeSegment | None:
        """None where there is no room; tried again later, not before every row."""
        now_ns = time.monotonic_ns()
        if now_ns < self._retry_ns:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            make_room(self._folder, self._total_bytes - self._rows_per_file * DTYPE.itemsize)
            path = self._folder / f"{self._boot_id:016x}-{self._files:04d}{SEGMENT}"
            segment = NodeSegment(path, self._device, self._boot_id, self._files, self._rows_per_file)
        except (OSError, RunLogError) as error:
            self._retry_ns = now_ns + RETRY_NS
            self._say(str(error))
            return None
        self.close()
        self._segment, self._files = segment, self._files + 1
        self._count()
        return segment

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            print(
                f"{self._device}: its own rows are not kept: {what}; it serves on, or start it with --rows FOLDER",
                file=sys.stderr,
                flush=True,
            )


def make_room(folder: Path, total_bytes: int) -> None:
    """Remove the oldest files of rows until the rest is no more than that. Those being written stay. Raises OSError."""
    files = [(path.stat(), path) for path in folder.glob(f"*{SEGMENT}")]
    excess_bytes = sum(stat.st_size for stat, _ in files) - total_bytes
    for stat, path in sorted(files, key=lambda file: (file[0].st_mtime_ns, file[1].name)):
        if excess_bytes <= 0:
            return
        if not is_written(path):
            path.unlink(missing_ok=True)
            excess_bytes -= stat.st_size
