"""Chrome's trace format, event by event into a file: Perfetto, chrome://tracing and viztracer read it."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from testbed.runlog.segment import new_file

Arguments = Mapping[str, Any]

KINDS = ("slices", "flows", "instants", "counters")
HEAD = b'{"displayTimeUnit":"ns","traceEvents":[\n'
TAIL = b"\n]}\n"
PAST_THE_TICK_NS = 0.2  # readers turn microseconds into whole nanoseconds, some cutting off what is left
GZIP_LEVEL = 5


class Track(NamedTuple):
    """A line of slices: a thread of a process, in the format's words."""

    pid: int
    tid: int


class ChromeTrace:
    """Writes events; times in nanoseconds on one clock, shown from `origin_ns` on. `drawn` counts them, by KINDS.

    Slices of a track nest or follow each other; of two that begin together the outer one is written first. An argument
    that is None is left out.
    """

    def __init__(self, file: IO[bytes], origin_ns: int) -> None:
        self.drawn: Counter[str] = Counter()
        self._file, self._origin_ns = file, origin_ns
        self._encode = msgspec.json.Encoder().encode
        self._separator = b""

    def name_process(self, pid: int, name: str) -> None:
        self._put({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        self._put({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})

    def name_track(self, track: Track, name: str) -> None:
        where = track._asdict()
        self._put({"ph": "M", "name": "thread_name", **where, "args": {"name": name}})
        self._put({"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": track.tid}})

    def slice(
        self, track: Track, name: str, start_ns: int, end_ns: int, category: str, args: Arguments | None = None
    ) -> None:
        length_us = (end_ns - start_ns + PAST_THE_TICK_NS) / 1e3
        self._event("X", track, name, start_ns, category, {"dur": length_us, "args": _known(args or {})})
        self.drawn["slices"] += 1

    def instant(self, track: Track, name: str, at_ns: int, category: str, args: Arguments) -> None:
        self._event("i", track, name, at_ns, category, {"s": "t", "args": _known(args)})
        self.drawn["instants"] += 1

    def counter(self, pid: int, name: str, at_ns: int, unit: str, value: float) -> None:
        self._event("C", Track(pid, 0), name, at_ns, "counter", {"args": {unit: value}})
        self.drawn["counters"] += 1

    def flow(self, name: str, ident: int, *stops: tuple[Track, int]) -> None:
        """An arrow through what is open on these tracks at these times; of nested slices that is the inner one."""
        for i, (track, at_ns) in enumerate(stops):
            step = "s" if i == 0 else "f" if i == len(stops) - 1 else "t"
            self._event(step, track, name, at_ns, "flow", {"id": ident, "bp": "e"})
        self.drawn["flows"] += len(stops) - 1

    def _event(self, kind: str, track: Track, name: str, at_ns: int, category: str, more: Arguments) -> None:
        at_us = (at_ns - self._origin_ns + PAST_THE_TICK_NS) / 1e3
        about = {"ph": kind, "pid": track.pid, "tid": track.tid, "ts": at_us, "name": name, "cat": category}
        self._put({**about, **more})

    def _put(self, event: Arguments) -> None:
        self._file.write(self._separator + self._encode(event))
        self._separator = b",\n"


@contextmanager
def chrome_trace(path: Path, origin_ns: int) -> Iterator[ChromeTrace]:
    """A trace that becomes `path` once the block has ended well, gzipped where that ends in .gz.

    Raises RunLogError where the file cannot be written.
    """
    with new_file(path) as temporary, temporary.open("wb") as plain:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", GZIP_LEVEL, plain, mtime=0) as packed:
                yield from _framed(packed, origin_ns)  # type: ignore[arg-type]  # typeshed: it is no IO[bytes]
        else:
            yield from _framed(plain, origin_ns)


def _framed(file: IO[bytes], origin_ns: int) -> Iterator[ChromeTrace]:
    file.write(HEAD)
    yield ChromeTrace(file, origin_ns)
    file.write(TAIL)


def _known(args: Arguments) -> dict[str, Any]:
    return {name: value for name, value in args.items() if value is not None}
