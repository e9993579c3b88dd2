"""A run as a trace for Perfetto (https://ui.perfetto.dev): who did what when, round by round.

Everything stands on the base station's monotonic clock. A node's stamps are moved by the clock offset of their own row;
by how much that can be wrong (clock_bound_ns) stands on every slice that needed it, and is a counter of each device.
A round's beginning was not stamped: it is drawn as late as its first message and the next round allow, and says by how
much earlier it can have been.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, groupby, repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from testbed.errors import RunLogError
from testbed.runlog.chrome_trace import KINDS, ChromeTrace, Track, chrome_trace
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.trace_round import ROUNDS, DeviceTracks, Row, Span, Written, write_round
from testbed.wire.figures import unit_of

ROWS_AT_ONCE = 16_384
POLICIES, PROMPTS, EVENTS = (Track(ROUNDS.pid, tid) for tid in (11, 12, 14))
STATION_TRACKS = {POLICIES: "policies", PROMPTS: "prompts", ROUNDS: "rounds", EVENTS: "events"}


class TraceSummary(NamedTuple):
    """What a trace holds: of the log, and as Perfetto counts it."""

    written: Written
    events: int
    drawn: Counter[str]  # by KINDS

    def document(self) -> dict[str, int]:
        return {**asdict(self.written), "events": self.events, **{kind: self.drawn[kind] for kind in KINDS}}


class Stretch(NamedTuple):
    """Rounds in a row that have something in common."""

    key: Any
    name: str
    start_ns: int


def write_trace(
    run_dir: Path,
    path: Path,
    *,
    policy: int | None = None,
    rounds: tuple[int, int] | None = None,
) -> TraceSummary:
    """Write rounds A to B, B excluded, of one policy or of all into `path`, gzipped where that ends in .gz.

    Raises RunLogError where no round is left to draw, or the file cannot be written.
    """
    manifest, table = read_manifest(run_dir), read_table(run_dir, "rounds")
    written, start_ns_of = Written(), round_starts_ns(table)
    table = _chosen(table, policy, rounds)
    spans = _spans(_rounds_of(table), start_ns_of, written)
    first = next(spans, None)
    if first is None:
        raise RunLogError(f"{run_dir}: no round with stamps among those asked for; choose others")
    events = read_events(run_dir)
    if policy is not None or rounds is not None:
        between_ns = first.start_ns, _last_stamp_ns(table)
        events = [event for event in events if _belongs(event, policy, between_ns, whole=rounds is None)]
    origin_ns = min([first.start_ns, *map(_stamp_ns, events)])
    with chrome_trace(path, origin_ns) as trace:
        _name_tracks(trace, manifest)
        trace.instant(EVENTS, "about", first.start_ns, "about", _about(run_dir, manifest))
        _write_rounds(trace, chain([first], spans), manifest["policies"], written)
        _write_events(trace, events, manifest["devices"])
    return TraceSummary(written, len(events), trace.drawn)


def _chosen(table: pa.Table, policy: int | None, rounds: tuple[int, int] | None) -> pa.Table:
    table = table.select([name for name in Row._fields if name in table.column_names])
    if policy is not None:
        table = table.filter(pc.equal(table["policy"], policy))
    if rounds is not None:
        number = table["round"]
        table = table.filter(pc.and_(pc.greater_equal(number, rounds[0]), pc.less(number, rounds[1])))
    return table


def _rounds_of(table: pa.Table) -> Iterator[list[Row]]:
    """Round after round; only a few thousand rows are Python's objects at a time."""

    def rows() -> Iterator[Row]:
        for batch in table.to_batches(ROWS_AT_ONCE):
            known = {name: batch[name].to_pylist() for name in batch.schema.names}
            yield from map(Row, *(known.get(name, repeat(None)) for name in Row._fields))

    return (list(rows_of_round) for _, rows_of_round in groupby(rows(), attrgetter("round")))


def round_starts_ns(table: pa.Table) -> dict[int, int]:
    """When each round began, at the latest: before its first message, and so that it was over when the next one began.

    A round in which nothing was sent has no stamp and is left out.
    """
    lengths = ("select_ns", "group_ns", "quantise_ns", "round_ns")
    wanted = [("bs_sent_ns", "min"), *((name, "max") for name in lengths)]
    rounds = table.group_by("round", use_threads=False).aggregate(wanted).sort_by("round")
    rounds = rounds.filter(pc.and_(pc.is_valid(rounds["bs_sent_ns_min"]), pc.is_valid(rounds["round_ns_max"])))
    select_ns, group_ns, quantise_ns, round_ns = (rounds[f"{name}_max"].fill_null(0).to_numpy() for name in lengths)
    latest_ns = rounds["bs_sent_ns_min"].to_numpy() - select_ns - group_ns - quantise_ns
    before_ns = np.cumsum(round_ns) - round_ns  # spent in earlier rounds
    start_ns = before_ns + np.minimum.accumulate((latest_ns - before_ns)[::-1])[::-1]
    return dict(zip(rounds["round"].to_pylist(), start_ns.tolist(), strict=True))


def _spans(rounds: Iterable[Sequence[Row]], start_ns_of: Mapping[int, int], written: Written) -> Iterator[Span]:
    for rows in rounds:
        first = rows[0]
        start_ns = start_ns_of.get(first.round)
        if start_ns is None:
            written.rounds_without_stamps += 1
            continue
        received_ns = max((row.bs_received_ns for row in rows if row.bs_received_ns is not None), default=None)
        slack_ns = None if received_ns is None else max(0, start_ns + (first.round_ns or 0) - received_ns)
        yield Span(rows, start_ns, slack_ns)


def _write_rounds(trace: ChromeTrace, spans: Iterable[Span], policies: Sequence[str], written: Written) -> None:
    under_policy, of_prompt = _stretches(trace, POLICIES, "policy"), _stretches(trace, PROMPTS, "prompt")
    last_end_ns = 0
    for span in spans:
        first = span.first
        under_policy(Stretch(first.policy, policies[first.policy], span.start_ns), last_end_ns)
        of_prompt(Stretch((first.policy, first.prompt), f"prompt {first.prompt}", span.start_ns), last_end_ns)
        write_round(trace, span, policies[first.policy], written)
        last_end_ns = span.end_ns
    under_policy(None, last_end_ns)
    of_prompt(None, last_end_ns)


def _stretches(trace: ChromeTrace, track: Track, category: str) -> Callable[[Stretch | None, int], None]:
    """Draws a stretch once another one begins, as ending with its last round."""
    current: Stretch | None = None

    def go_on(stretch: Stretch | None, last_end_ns: int) -> None:
        nonlocal current
        if current is not None and (stretch is None or stretch.key != current.key):
            trace.slice(track, current.name, current.start_ns, last_end_ns, category)
            current = None
        current = current or stretch

    return go_on


def _belongs(event: Mapping[str, Any], policy: int | None, between_ns: tuple[int, int], *, whole: bool) -> bool:
    """Of a whole policy all its own events, since a prompt is scored after its last round; of the others what came
    meanwhile."""
    if policy is not None and event.get("policy", policy) != policy:
        return False
    return (whole and "policy" in event) or between_ns[0] <= _stamp_ns(event) <= between_ns[1]


def _stamp_ns(event: Mapping[str, Any]) -> int:
    """Of a sample of power the sample's own time."""
    return int(event.get("sampled_ns", event["monotonic_ns"]))


def _last_stamp_ns(table: pa.Table) -> int:
    stamps = (pc.max(table[name]).as_py() for name in ("bs_sent_ns", "bs_received_ns"))
    return max(int(stamp) for stamp in stamps if stamp is not None)


def _write_events(trace: ChromeTrace, events: Iterable[Mapping[str, Any]], devices: Sequence[str]) -> None:
    """A node's events stand on its track, all others on the base station's."""
    track_of = {name: DeviceTracks.of(device).node for device, name in enumerate(devices)}
    for event in events:
        track = track_of.get(event.get("device", ""), EVENTS)
        facts = {name: value for name, value in event.items() if name not in ("kind", "monotonic_ns")}
        if event["kind"] == "power":
            trace.counter(track.pid, "power", _stamp_ns(event), "W", event["power_w"])
        elif event["kind"] == "telemetry":
            for sample in event["samples"]:
                for figure, value in sample["figures"].items():
                    if value is not None:
                        trace.counter(track.pid, figure, sample["sampled_ns"], unit_of(figure), value)
        else:
            trace.instant(track, event["kind"], _stamp_ns(event), "event", facts)


def _name_tracks(trace: ChromeTrace, manifest: Mapping[str, Any]) -> None:
    trace.name_process(ROUNDS.pid, "base station")
    for track, name in STATION_TRACKS.items():
        trace.name_track(track, name)
    emulated = _emulated(manifest)
    for device, name in enumerate(manifest["devices"]):
        tracks = DeviceTracks.of(device)
        trace.name_process(tracks.node.pid, f"{name} (emulated)" if name in emulated else name)
        for place, track in tracks._asdict().items():
            trace.name_track(track, place)


def _about(run_dir: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": run_dir.resolve().name,
        "clock": "the base station's; nodes' stamps minus their clock offset, which clock_bound_ns says the error of",
        "times": "real ones, as they passed: where dilation is not 1, emulated time was stretched by it",
        "send, wait, dequantise, combine": "alternate within a round; each is drawn once, with its sum",
        "links": manifest.get("links"),
        "emulated devices": ", ".join(_emulated(manifest)) or "none",
    }


def _emulated(manifest: Mapping[str, Any]) -> Sequence[str]:
    """Devices that play another one."""
    emulated = manifest.get("emulated") or {}
    return list(emulated.get("compute_flops_per_s", emulated))  # older runs: by speed
