"""`testbed logs compare`: what another policy, or another run, saved on the same prompts, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.logs import DEFAULT_LOGS, JsonOption, LogsOption

if TYPE_CHECKING:
    from testbed.runlog.compare import Compared

EXAMPLE = "Example: testbed logs compare latest --policy 0 --policy 2"


def command(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Runs: names, folders or latest (the default).")
    ] = None,
    policy: Annotated[
        list[int] | None,
        typer.Option("--policy", metavar="N", help="Only this policy of each run, counted from 0; repeatable."),
    ] = None,
    as_json: JsonOption = False,
    logs: LogsOption = DEFAULT_LOGS,
) -> None:
    """Compare policies of one run or of several, paired by prompt, with the first policy of the first run."""
    from testbed.cli.logs_show import figures_of
    from testbed.cli.output import console, print_json_line
    from testbed.runlog.catalog import find_run
    from testbed.runlog.compare import aborted, compare_runs

    run_dirs = [find_run(run, logs) for run in runs or ["latest"]]
    compared = compare_runs(run_dirs, policy or [])
    valid = {run_dir.name: _valid(figures_of(run_dir)) for run_dir in run_dirs}
    if as_json:
        rows = [{**one.document(), "valid": valid[one.run].get(one.index)} for one in compared]
        print_json_line({"reference": {"run": compared[0].run, "policy": compared[0].policy}, "rows": rows})
        return
    display = console()
    display.print(_table(compared, valid))
    for note in _notes(aborted(compared)):
        display.print(note, soft_wrap=True)


def _valid(figures: Mapping[str, Any] | None) -> dict[int, bool]:
    return {index: row["valid"] for index, row in enumerate((figures or {}).get("rows", ()))}


def _table(compared: Sequence[Compared], valid: Mapping[str, Mapping[int, bool]]) -> Any:
    from testbed.cli.output import table

    several = len({one.run for one in compared}) > 1
    head = ["policy", "prompts", "prefill cut\n(95 %)", "decode cut\n(95 %)", "per-\nplexity", "more\n(95 %)"]
    rows = [
        [
            (f"{one.run}  " if several else "")
            + f"{one.index} {one.policy}"
            + ("\nINVALID" if valid[one.run].get(one.index) is False else ""),
            str(one.prompts),
            _cut(*one.prefill),
            _cut(*one.decode),
            "-" if math.isnan(one.perplexity) else f"{one.perplexity:.3f}",
            _more(*one.perplexity_more),
        ]
        for one in compared
    ]
    return table(f"Against {compared[0].run}  {compared[0].policy}", head, rows)


def _notes(aborted: Sequence[str]) -> list[str]:
    notes = [f"ABORTED: {name} ended before its last prompt; only prompts that both finished count" for name in aborted]
    return [
        *notes,
        "cut: 1 - sum of emulated times of the rounds / the same sum of the reference, over the same prompts; decode: "
        "of the rounds of one token, averaged per prompt",
        "more: perplexity beyond the reference's; intervals by a bootstrap over pairs of prompts, - where there is one",
    ]


def _cut(cut: float, low: float, high: float) -> str:
    if math.isnan(cut):
        return "-"
    return f"{100 * cut:.1f} %" + ("\n-" if math.isnan(low) else f"\n{100 * low:.1f} to {100 * high:.1f}")


def _more(more: float, low: float, high: float) -> str:
    if math.isnan(more):
        return "-"
    return f"{more:+.3f}" + ("\n-" if math.isnan(low) else f"\n{low:+.3f} to {high:+.3f}")
