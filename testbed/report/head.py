"""What stands above a report's figures: what the run was, what of it is emulated, and whether it counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from testbed.errors import RunLogError
from testbed.experiment.results import summarise
from testbed.report.data import Row, RunData
from testbed.report.quality import PolicyQuality
from testbed.runlog.catalog import Run, State, read_results

NOT_JUDGED, VALID, INVALID = "not judged", "valid", "INVALID"
STATE_SENTENCES = {
    State.ABORTED: "This run was aborted: it was killed, interrupted, or ended by an error before its last prompt. "
    "Everything below is what had been recorded until then.",
    State.RUNNING: "This run is still going on: everything below is what had been recorded when this page was made.",
}
VERDICT_SENTENCES = {
    INVALID: "INVALID: too many tokens lost all their experts, or rounds took more than 10 % longer than what is "
    "emulated asks for in more than 1 % of the rounds. Do not quote its figures.",
    NOT_JUDGED: "Whether its figures count could not be judged: the run is not whole, or it is older than what "
    "that needs.",
}


@dataclass(frozen=True, slots=True)
class Head:
    """Words and figures of the report's head."""

    run: Run
    verdict: str
    sentences: list[str]  # what a reader must know first
    tiles: list[tuple[str, str]]  # figure, what it is
    facts: list[tuple[str, str]]
    query: str


def head(data: RunData, figures: list[PolicyQuality]) -> Head:
    """The run's head. Raises RunLogError where the log is damaged."""
    run = data.run
    verdict = _verdict(data, run)
    query = (
        "select count(distinct round) as rounds, count(*) filter (rows > 0) as requests,\n"
        "  count(*) filter (status = 1) as answered, max(dilation) as dilation, min(dilation) as least_dilation,\n"
        "  (max(bs_received_ns) - min(bs_sent_ns)) / 1e9 as seconds\n"
        f"from rounds where {data.here}"
    )
    [counts] = data.rows(query)
    known = [STATE_SENTENCES.get(run.state, ""), VERDICT_SENTENCES.get(verdict, "")]
    return Head(
        run=run,
        verdict=verdict,
        sentences=[sentence for sentence in known if sentence],
        tiles=list(_tiles(data, counts, figures)),
        facts=list(_facts(data, run, counts)),
        query=query,
    )


def _verdict(data: RunData, run: Run) -> str:
    kept = read_results(data.run_dir)
    if kept is not None and "valid" in kept:
        return VALID if kept["valid"] else INVALID
    if run.state is not State.FINISHED:
        return NOT_JUDGED
    try:
        return VALID if summarise(data.run_dir).valid else INVALID
    except (RunLogError, KeyError, ValueError):  # a run without prompts, or of a time before what is asked for
        return NOT_JUDGED


def _tiles(data: RunData, counts: Row, figures: list[PolicyQuality]) -> Iterator[tuple[str, str]]:
    yield f"{counts['rounds']:,}", "rounds recorded"
    if counts["requests"]:
        thousandths = 1000 * counts["answered"] // counts["requests"]  # rounded down: 100 % means all of them
        yield f"{thousandths / 10:g} %", f"of {counts['requests']:,} requests answered in time"
    best = min(figures, key=lambda one: one.block_ms, default=None)
    if best is not None:
        yield f"{best.block_ms:.1f} ms", f"mean prefill block under {best.policy}, the fastest"
        if best is not figures[0]:
            yield f"−{100 * best.cut.cut:.0f} %", f"against {data.policy(data.compared[0])}, same prompts"
        if best.perplexity is not None:
            yield f"{best.perplexity:.2f}", f"perplexity under {best.policy}"


def _facts(data: RunData, run: Run, counts: Row) -> Iterator[tuple[str, str]]:
    manifest, where = data.manifest, data.manifest.get("environment") or {}
    yield "Model", run.model or "not told"
    if text := manifest.get("text"):
        yield "Text", str(text)
    yield "Nodes", f"{len(data.devices)}: {', '.join(data.devices)}"
    yield "Policies", ", ".join(data.policies)
    yield "Emulated", _emulated(data, counts)
    yield "Measured", _measured(data)
    yield "Simulated", "nothing: every round went over sockets to nodes that computed it"
    if encryption := manifest.get("encryption"):
        yield "Encryption", str(encryption)
    if where:
        memory = f", {where['memory_bytes'] / 2**30:.0f} GiB" if where.get("memory_bytes") else ""
        yield (
            "Base station",
            f"{where.get('cpu') or 'unknown CPU'}, {where.get('cpus')} cores{memory}, {where.get('platform')}",
        )
    if counts["seconds"]:
        yield "Took", f"{counts['seconds']:.0f} s of real time, seed {manifest.get('seed')}"


def _emulated(data: RunData, counts: Row) -> str:
    emulated = data.manifest.get("emulated") or {}
    parts = []
    if emulated:
        count = len(emulated.get("compute_flops_per_s", emulated))
        parts.append(f"compute of {count} of {len(data.devices)} nodes, padded to each device's speed in the run file")
    if "emulated" in str(data.manifest.get("links", "")):
        parts.append(f"links ({data.manifest['links']})")
    if (counts["dilation"] or 1) > 1:
        least, most = counts["least_dilation"], counts["dilation"]
        stretch = f"{most:g}" if least == most else f"{least:g} to {most:g}"
        parts.append(f"time, stretched {stretch} times; figures here are divided by that again")
    return "; ".join(parts) or "nothing"


def _measured(data: RunData) -> str:
    links = (
        ""
        if "emulated" in str(data.manifest.get("links", ""))
        else f", links ({data.manifest.get('links', 'not told')})"
    )
    compute = "" if data.manifest.get("emulated") else ", compute"
    return f"the base station's own times, bytes on the wire, clocks, routing and quality{links}{compute}"
