"""`testbed logs tail`: a run's rounds as they come."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, LogsOption, RunArgument

if TYPE_CHECKING:
    from testbed.runlog.follow import Round

EXAMPLE = "Example: testbed logs tail latest"


def command(
    run: RunArgument = "latest",
    last: Annotated[int, typer.Option("--last", "-n", min=0, help="Begin with so many that are there.")] = 10,
    once: Annotated[bool, typer.Option("--once", help="Print what is there and end.")] = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: Annotated[bool, typer.Option("--json", help="Each line is a JSON document.")] = False,
) -> None:
    """Follow a run, a line per round. Its time and the device it waited for; Ctrl-C ends it."""
    from contextlib import suppress

    from testbed.cli.output import console
    from testbed.runlog.catalog import State, describe_run, find_run
    from testbed.runlog.follow import follow

    run_dir = find_run(run, logs)
    about, stderr = describe_run(run_dir), console(stderr=True)
    if not as_json:
        emulated = f"; compute {about.compute}; links: {about.channel}" if about.channel else ""
        stderr.print(f"{about.run} is {about.state.value}{emulated}", soft_wrap=True)
        print(HEAD, flush=True)
    with suppress(KeyboardInterrupt):
        for found in follow(run_dir, last, once=once):
            print(json.dumps(found.document(), ensure_ascii=False) if as_json else _line(found), flush=True)
        if about.state is State.RUNNING and not once and not as_json:
            stderr.print(f"{about.run} is {describe_run(run_dir).state.value}", soft_wrap=True)


WIDTHS = (8, 24, 6, 5, 7, 6, 6, 9)
HEAD = (
    "  ".join(
        f"{name:>{width}}"
        for name, width in zip(
            ("round", "policy", "prompt", "layer", "phase", "tokens", "rows", "ms"), WIDTHS, strict=True
        )
    )
    + "  slowest device (round trip, ms)"
)


def _line(found: Round) -> str:
    cells = (found.round, found.policy, found.prompt, found.layer, found.phase, found.tokens, found.rows)
    line = "  ".join(f"{cell:>{width}}" for cell, width in zip((*cells, _ms(found.round_s)), WIDTHS, strict=True))
    slowest = "-" if found.slowest is None else f"{found.slowest} ({_ms(found.slowest_s)})"
    missing = "".join(f"  {device} {what}" for device, what in found.unanswered.items())
    return f"{line}  {slowest}{missing}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"
