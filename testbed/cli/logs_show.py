"""`testbed logs show`: where the time of a run went, per phase and node, and who was waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption, RunArgument

if TYPE_CHECKING:
    from testbed.runlog.breakdown import NodeLoad, PhaseTimes
    from testbed.runlog.show import Shown, ShownPolicy

EXAMPLE = "Example: testbed logs show latest --policy 1 --exact"
GENERATIONS = ("prefill", "decode")


def command(
    run: RunArgument = "latest",
    policy: Annotated[
        int | None, typer.Option("--policy", metavar="N", help="Only this policy, counted from 0; default: the first.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Quantiles of the rows themselves, not within 1 %.")] = False,
    as_json: JsonOption = False,
    logs: LogsOption = DEFAULT_LOGS,
) -> None:
    """Show where the time of a run went: every phase and node with p50, p95 and p99, and who was the bottleneck."""
    from testbed.cli.output import console, print_json_line
    from testbed.runlog.catalog import find_run
    from testbed.runlog.show import show_run

    run_dir = find_run(run, logs)
    shown = show_run(run_dir, policy, figures_of(run_dir), exact=exact)
    if as_json:
        print_json_line(shown.document())
        return
    display, chosen = console(), shown.policies[0]
    for drawn in (_policy_table(shown), _phase_table(chosen), _node_table(chosen)):
        display.print(drawn)
    for note in shown.notes():
        display.print(note, soft_wrap=True)
    if len(shown.policies) > 1:
        display.print(f"phases and nodes: of policy {chosen.index}, {chosen.policy}; another one: --policy N")


def figures_of(run_dir: Path) -> Mapping[str, Any] | None:
    """The run's results as they were kept, made and kept now for a run that ended without; None for an aborted one."""
    from testbed.runlog.catalog import State, describe_run, read_results, write_results

    kept = read_results(run_dir)
    if kept is not None or describe_run(run_dir).state is not State.FINISHED:
        return kept
    from testbed.experiment.results import summarise

    try:
        write_results(run_dir, summarise(run_dir).document())
    except KeyError:  # rows or manifest of an older program, which tell less
        return None
    return read_results(run_dir)


def _policy_table(shown: Shown) -> Any:
    from testbed.cli.output import table

    flags = "".join(f"  {note.split(':')[0]}" for note in shown.warnings())
    head = ["policy", *(h for g in GENERATIONS for h in (f"{g}\nrounds", f"{g} round, ms\np50 / p95 / p99"))]
    rows = [
        [
            f"{policy.index} {policy.policy}" + ("\nINVALID" if policy.valid is False else ""),
            *(cell for generation in GENERATIONS for cell in _whole_round(policy, generation)),
            f"{sum(n.late for n in policy.nodes)} / {sum(n.lost for n in policy.nodes)} / {policy.orphaned}",
        ]
        for policy in shown.policies
    ]
    return table(f"Run {shown.run.run}{flags}", [*head, "late / lost\n/ orphaned"], rows)


def _whole_round(policy: ShownPolicy, generation: str) -> tuple[str, str]:
    for times in policy.phases:
        if times.phase == "whole round" and times.generation == generation and times.count:
            return str(times.count), " / ".join(map(milliseconds, (times.p50_ms, times.p95_ms, times.p99_ms)))
    return "0", "-"


def _phase_table(policy: ShownPolicy) -> Any:
    from testbed.cli.output import table

    named: dict[tuple[str, str], dict[str, PhaseTimes]] = {}
    for times in policy.phases:
        named.setdefault((f"{times.where} {times.phase}", times.node or ""), {})[times.generation] = times
    head = ["phase", "node", *(h for g in GENERATIONS for h in (f"{g} ms\np50", "\np95", "\np99", "\n±"))]
    rows = [[*name, *(cell for g in GENERATIONS for cell in _quantiles(both.get(g)))] for name, both in named.items()]
    return table(f"Policy {policy.index}, {policy.policy}: phases of a round", head, rows)


def _quantiles(times: PhaseTimes | None) -> list[str]:
    if times is None:
        return ["-", "-", "-", ""]
    bound = "" if times.bound_ms is None else milliseconds(times.bound_ms)
    return [*map(milliseconds, (times.p50_ms, times.p95_ms, times.p99_ms)), bound]


def _node_table(policy: ShownPolicy) -> Any:
    from testbed.cli.output import table

    by_node: dict[str, dict[str, NodeLoad]] = {}
    for load in policy.nodes:
        by_node.setdefault(load.node, {})[load.generation] = load
    joules = policy.joule_per_token_measured
    head = ["node", *(h for g in GENERATIONS for h in (f"{g} rounds\nwaited for", "alone\nms/round"))]
    rows = [
        [
            node,
            *(cell for g in GENERATIONS for cell in _waited(loads.get(g))),
            f"{sum(n.requests for n in loads.values())}",
            f"{sum(n.late for n in loads.values())} / {sum(n.lost for n in loads.values())}",
            *([] if joules is None else [_joule(joules.get(node))]),
        ]
        for node, loads in by_node.items()
    ]
    title = f"Policy {policy.index}, {policy.policy}: who was waited for last (alone: when nobody else was any more)"
    return table(title, [*head, "\nrequests", "\nlate / lost", *([] if joules is None else ["\nJ/token"])], rows)


def _waited(load: NodeLoad | None) -> Sequence[str]:
    if load is None or not load.rounds:
        return "-", "-"
    return f"{100 * load.bottleneck / load.rounds:.1f} %", milliseconds(load.alone_ms / load.rounds)


def _joule(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """Three digits that say something."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 or not value else "<0.001"
