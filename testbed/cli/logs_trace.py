"""`testbed logs trace`: a run to look at in Perfetto."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, ForceOption, JsonOption, LogsOption, RunArgument, check_new_file

EXAMPLE = "Example: testbed logs trace latest --policy 0 --rounds 0:200 --out trace.json.gz"


def command(
    run: RunArgument = "latest",
    policy: Annotated[
        int | None, typer.Option(min=0, help="Only this policy, by its number in the run; default: all.")
    ] = None,
    rounds: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only rounds A to B, B excluded; either may be left out.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file, gzipped if it ends in .gz; default: trace.json.gz of the run."),
    ] = None,
    force: ForceOption = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Draw a run's rounds, blocks, losses and events as a trace: open it at ui.perfetto.dev, nothing is uploaded."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.runlog.catalog import describe_run, find_run
    from testbed.runlog.trace import write_trace

    run_dir = find_run(run, logs)
    path = out or run_dir / "trace.json.gz"
    check_new_file(path, force=force)
    figures = write_trace(run_dir, path, policy=policy, rounds=_range(rounds)).document()
    facts = describe_run(run_dir)
    if as_json:
        size_bytes = path.stat().st_size
        print_json_line(
            {"run": facts.run, "state": facts.state.value, "file": str(path), "bytes": size_bytes, **figures}
        )
        return
    shown = [(name.replace("_", " "), f"{value:,}") for name, value in figures.items()]
    console().print(table(f"Trace of {facts.run} ({facts.state.value})", ("what", "number"), shown))
    console().print(f"{path}: open it at https://ui.perfetto.dev, which reads it in the browser", soft_wrap=True)


def _range(text: str | None) -> tuple[int, int] | None:
    from testbed.errors import ConfigError

    if text is None:
        return None
    found = re.fullmatch(r"(\d*):(\d*)", text)
    first, after = (int(found[1] or 0), int(found[2] or 2**63 - 1)) if found else (0, 0)
    if first >= after or after >= 2**63:
        raise ConfigError(f"--rounds {text}: give A:B with A below B, for example 0:200")
    return first, after
