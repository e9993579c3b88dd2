"""The figures on a terminal: a view that is drawn anew, or a line where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from testbed.cli.output import table
from testbed.watch.boards import boards
from testbed.watch.figures import RECENT_ROUNDS, Figures, NodeFigures, PolicyProgress, Way
from testbed.watch.words import plain

PRESENT = {True: "there", False: "lost", None: "-"}
DONE = {"running": "", "finished": " (this is its end)", "aborted": " (it did not reach its end)"}


@contextmanager
def live_view(display: Console) -> Iterator[Callable[[Figures], None]]:
    """What shows new figures: in place on a terminal, as a line where they changed elsewhere."""
    if display.is_terminal and not display.is_dumb_terminal:
        with Live(console=display, auto_refresh=False, vertical_overflow="crop") as live:
            yield lambda figures: live.update(view(figures), refresh=True)
        return
    printed = ""

    def show(figures: Figures) -> None:
        nonlocal printed
        if (found := line(figures)) != printed:
            print(found, file=display.file, flush=True)
            printed = found

    yield show


def view(figures: Figures) -> RenderableType:
    """Everything, as tables."""
    parts: list[RenderableType] = [*(Text(words) for words in _head(figures)), _nodes(figures)]
    if (told := boards(figures.nodes)) is not None:
        parts.append(told)
    if figures.last is not None:
        parts += [_links(figures), _policies(figures)]
    return Group(*parts, *(Text(words) for words in _incidents(figures)))


def line(figures: Figures) -> str:
    """The same in one line, for pipes and files."""
    last, nodes = figures.last, figures.nodes
    there = sum(node.present is True for node in nodes)
    late, failed = sum(node.count("late") for node in nodes), sum(node.failed for node in nodes)
    found = [f"{figures.run} {figures.state}: prompts {_of(figures.prompts_done, figures.prompts)}"]
    if last is not None:
        where = f"policy {last.policy}, prompt {last.prompt}, {last.phase} layer {last.layer}"
        found += [f"round {last.round} ({where}){_stretched(last.dilation)}", *_speed(figures), *_dropped(figures)]
    return "; ".join([*found, f"nodes {there} of {len(nodes)}, late {late}, lost {failed}"])


def _head(figures: Figures) -> Iterator[str]:
    yield f"{figures.run} is {figures.state}{DONE[figures.state]}; {figures.model or 'model unknown'}"
    yield f"links: {figures.links or 'unknown'}; compute {figures.compute}"
    last = figures.last
    prompts = f"prompts done: {_of(figures.prompts_done, figures.prompts)}"
    if last is None:
        yield f"{prompts}; no round yet"
        return
    at = "" if last.at_realtime_s is None else f", {_clock(last.at_realtime_s)}"
    where = f"prompt {last.prompt}, {last.phase}, layer {last.layer}{_stretched(last.dilation)}"
    yield f"{prompts}; policy {last.policy}, {where}; round {last.round}{at}"
    emulated = "" if last.dilation == 1 else " (emulated time)"
    round_ms = f"round {_ms(last.median_s)} ms, 95th percentile {_ms(last.p95_s)} ms{emulated}"
    yield "; ".join([*_speed(figures), round_ms, f"all over the last {RECENT_ROUNDS} rounds"])


def _stretched(dilation: float) -> str:
    return "" if dilation == 1 else f", time stretched ×{dilation:g}"


def _speed(figures: Figures) -> Iterator[str]:
    last = figures.last
    if last is not None and last.rounds_per_s is not None and last.tokens_per_s is not None:
        yield f"{last.rounds_per_s:.3g} rounds/s and {last.tokens_per_s:.3g} tokens/s by the wall clock"


def _dropped(figures: Figures) -> Iterator[str]:
    current = figures.current
    if current is not None and current.kept_fraction is not None:
        yield f"kept {_percent(current.kept_fraction)} of pairs, dropped mass {_percent(current.dropped_fraction)}"


def _nodes(figures: Figures) -> Table:
    head = ["node", "", "answered", "late\n/ lost", "waited\nfor", "ms\nexpected", "ms\nmeasured", "ratio"]
    rows = [_node(node) for node in figures.nodes]
    drawn = table("Nodes: requests, and estimate against measurement", head, rows)
    for row, node in zip(drawn.rows, figures.nodes, strict=True):
        row.style = "red" if node.present is False else None
    return drawn


def _node(node: NodeFigures) -> list[str]:
    last = node.last
    counts = [str(node.count("answered")), f"{node.count('late')} / {node.failed}"]
    state = PRESENT[node.present] + (f" ({node.joins}×)" if node.joins > 1 else "")
    if last is None:
        return [node.device, state, *counts, *["-"] * 4]
    ratio = "-" if last.measured_over_expected is None else f"{last.measured_over_expected:.2f}"
    return [node.device, state, *counts, _percent(last.waited_for), _ms(last.expected_s), _ms(last.measured_s), ratio]


def _links(figures: Figures) -> Table:
    head = ["link", *(f"{way}\n{name}" for way in ("down", "up") for name in ("asked", "measured", "one way"))]
    rows = [
        [node.device, *(_way(node.last.down) + _way(node.last.up) if node.last is not None else ["-"] * 6)]
        for node in figures.nodes
    ]
    return table("Links: Mbit/s asked and measured; ms one way ± what two clocks leave open", head, rows)


def _way(way: Way) -> list[str]:
    rates = [plain(None if rate is None else rate / 1e6) for rate in (way.asked_bits_per_s, way.measured_bits_per_s)]
    one_way = "-"
    if way.one_way_s is not None and way.bound_s is not None:
        one_way = f"{_ms(way.one_way_s)} ± {1e3 * way.bound_s:.2g}"
    return [*rates, one_way]


def _policies(figures: Figures) -> Table:
    head = ["policy", "prompts", "rounds", "pairs\nkept", "mass\ndropped", "orphaned\ntokens"]
    begun = [policy for policy in figures.policies if policy.rounds]
    drawn = table("Policies so far", head, [_policy(policy) for policy in begun])
    for row, policy in zip(drawn.rows, begun, strict=True):
        row.style = "bold" if policy is figures.current else None
    return drawn


def _policy(policy: PolicyProgress) -> list[str]:
    counts = [_of(policy.prompts_done, policy.prompts), str(policy.rounds)]
    shares = [_percent(policy.kept_fraction), _percent(policy.dropped_fraction)]
    return [policy.policy, *counts, *shares, str(policy.orphaned_tokens)]


def _incidents(figures: Figures) -> Iterator[str]:
    for incident in figures.incidents:
        at = "" if incident.at_realtime_s is None else f"{_clock(incident.at_realtime_s)} "
        what = ": ".join(word for word in (incident.device, incident.what) if word)
        yield f"{at}{incident.kind} {what}"


def _clock(realtime_s: float) -> str:
    return datetime.fromtimestamp(realtime_s).astimezone().strftime("%H:%M:%S")


def _of(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done} of {total}"


def _ms(seconds: float | None) -> str:
    return plain(None if seconds is None else 1e3 * seconds)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
