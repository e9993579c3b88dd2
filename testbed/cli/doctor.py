"""`testbed doctor`: say what is wrong with a machine or a run file before a run does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from testbed.errors import WdmoeError

if TYPE_CHECKING:
    from testbed.health.machine import Level, Verdict

EXAMPLE = "Example: testbed doctor configs/local.toml"
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


class Finding(NamedTuple):
    """What one check says: one line, with what to do where something is wrong."""

    level: Level
    check: str
    text: str


def command(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A run file (TOML) to check as well.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line that is one JSON document.")] = False,
) -> None:
    """Say what is wrong with this machine or a run file, and what to do. Exit code 1 if there is a problem."""
    from testbed.cli.output import console, print_json_line

    findings = examine(file)
    problems, warnings = (sum(finding.level == level for finding in findings) for level in ("problem", "warning"))
    if as_json:
        listed = [finding._asdict() for finding in findings]
        print_json_line({"ok": problems == 0, "problems": problems, "warnings": warnings, "findings": listed})
    else:
        out = console()
        for level, check, text in findings:
            out.print(f"{level:8} {check}: {text}", style=STYLES[level], soft_wrap=True)
        out.print(f"{problems} problem(s), {warnings} warning(s)", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def examine(file: Path | None) -> list[Finding]:
    """Check this machine and, where one is named, a run file and what it asks of this machine."""
    from testbed.health import machine

    findings = [_find(name, check) for name, check in machine.MACHINE_CHECKS.items()]
    findings.append(_find("base station", partial(machine.base_station, needed=file is not None)))
    return findings if file is None else findings + _examine_run_file(file)


def _examine_run_file(file: Path) -> list[Finding]:
    try:
        from testbed.config import load_run_file
        from testbed.health.run_file import RUN_CHECKS

        config = load_run_file(file)
    except WdmoeError as error:
        return [Finding("problem", "run file", str(error))]
    except ImportError as error:
        return [Finding("problem", "run file", f"cannot be checked ({error}); mend the packages first")]
    valid = Finding("ok", "run file", f"{file}: {len(config.devices)} devices, {len(config.policies)} policies")
    return [valid] + [_find(name, partial(check, config)) for name, check in RUN_CHECKS.items()]


def _find(name: str, check: Callable[[], Verdict]) -> Finding:
    try:
        level, text = check()
    except WdmoeError as error:
        level, text = "problem", str(error)
    except Exception as error:  # a machine may be broken in ways nobody thought of: say it, and check the rest
        level, text = "problem", f"cannot be checked ({type(error).__name__}: {error})"
    return Finding(level, name, " ".join(text.split()))
