"""`testbed logs collect`: the nodes' own rows beside the base station's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption, RunArgument

if TYPE_CHECKING:
    from testbed.runlog.node_account import NodeAccount

EXAMPLE = "Example: testbed logs collect latest copied/jetson-0 (was jetson-0:.local/state/wdmoe-testbed/node-rows)"
COUNTS = ("served", "used", "late", "lost", "invalid", "unsent", "refused", "only_node", "only_bs", "probes")
ALWAYS = ("served", "used", "late", "lost", "only_bs")
TIMES = {
    "in_node_ms_p50": "in node ms",
    "ready_ms_p50": "until sent ms",
    "bound_ms": "± ms",
    "would_have_taken_ms_p50": "with uplink ms",
}


def command(
    run: RunArgument = "latest",
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Copies of nodes' --rows folders; the run's own is always read."),
    ] = None,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Merge the rows that nodes wrote themselves into a run, and tell what became of replies that were not used."""
    from testbed.cli.output import console, print_json_line
    from testbed.runlog.catalog import describe_run, find_run
    from testbed.runlog.collect import collect
    from testbed.runlog.node_account import node_accounts

    run_dir = find_run(run, logs)
    collected = collect(run_dir, folders or ())
    accounts = node_accounts(run_dir)
    notes = _notes(collected.contradicting, collected.not_kept)
    if compute := describe_run(run_dir).compute:
        notes.append(f"compute: {compute}; times without what stretches them")
    if as_json:
        facts: dict[str, Any] = {"run": run_dir.name, "file": str(collected.file), "rows": collected.rows}
        facts |= {"new_rows": collected.new_rows, "contradicting": collected.contradicting}
        facts |= {"rows_not_kept": collected.not_kept, "nodes": [account.document() for account in accounts]}
        print_json_line({**facts, "problems": [str(problem) for problem in collected.problems]})
    else:
        console().print(_table(accounts))
        for note in (f"{collected.file}: {collected.rows} rows, {collected.new_rows} of them new", *notes):
            console().print(note, soft_wrap=True)
    for problem in collected.problems[1:]:
        console(stderr=True).print(str(problem), soft_wrap=True)
    if collected.problems:
        raise collected.problems[0]


def _table(accounts: list[NodeAccount]) -> Any:
    """Counts that are 0 everywhere are left out. Times are emulated ones where the run is."""
    from testbed.cli.output import table

    counts = [name for name in COUNTS if name in ALWAYS or any(getattr(account, name) for account in accounts)]
    rows = []
    for account in accounts:
        shown = [str(getattr(account, name)) for name in counts]
        shown += ["-" if (time := getattr(account, name)) is None else f"{time:.3f}" for name in TIMES]
        rows.append([account.node, *shown])
    title = "Blocks by the nodes' own rows; ms: medians of replies served and not used"
    return table(title, ["node", *(name.replace("_", " ") for name in counts), *TIMES.values()], rows)


def _notes(contradicting: int, not_kept: dict[str, int]) -> list[str]:
    notes = [f"{device}: {rows} rows found no room on its disk" for device, rows in not_kept.items()]
    if contradicting:
        notes.append(f"{contradicting} blocks have two different rows of the same node: both are kept")
    return notes
