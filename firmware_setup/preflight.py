"""Say what a board is and what is wrong with it, before a run does: python -m firmware_setup.preflight

Exit codes: 0 nothing to say; 3 warnings, a node runs; 4 problems, no node runs or it would compute wrong; 2 wrong
usage; 130 interrupted. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firmware_setup import summary
from firmware_setup.cuda import NOT_ASKED, ask_cuda
from firmware_setup.facts import Facts
from firmware_setup.host import read_memory, read_thermal
from firmware_setup.l4t import read_board, read_software
from firmware_setup.machine import Commands, Machine, NoCommands
from firmware_setup.network import read_route, read_wifi
from firmware_setup.power import read_clocks, read_power
from firmware_setup.time_sync import read_time_sync
from firmware_setup.verdicts import Finding, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERSION = 1  # of the JSON document
FINE, WARNINGS, PROBLEMS, INTERRUPTED = 0, 3, 4, 130
EPILOG = """exit codes: 0 nothing to say; 3 warnings, a node runs; 4 problems, no node runs or it would compute wrong;
2 wrong usage; 130 interrupted.

example: sudo python3 -m firmware_setup.preflight --bs 192.168.1.2 --python /opt/wdmoe/bin/python --json"""


def examine(
    machine: Machine, *, bs: str | None = None, python: str | None = sys.executable
) -> tuple[Facts, list[Finding]]:
    """Read all parts of a board and judge them. `python` is asked for CUDA; None: nobody is.

    A part that cannot be read is None in the facts, and a warning says why.
    """
    broken: list[Finding] = []

    def look(check: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # a board may be broken in ways nobody thought of: check the rest
            text = f"cannot be read ({type(error).__name__}: {error})"
            broken.append(Finding("warning", check, " ".join(text.split())[:300]))
            return None

    cuda = look("cuda", lambda: ask_cuda(machine, python) if python else NOT_ASKED)
    own = platform.python_version() if python == sys.executable else None
    facts = Facts(
        board=look("board", lambda: read_board(machine)),
        software=look("software", lambda: read_software(machine, (cuda.python if cuda else None) or own)),
        power=look("power", lambda: read_power(machine)),
        clocks=look("clocks", lambda: read_clocks(machine)),
        memory=look("memory", lambda: read_memory(machine)),
        thermal=look("thermal", lambda: read_thermal(machine)),
        cuda=cuda,
        wifi=look("wifi", lambda: read_wifi(machine)),
        time=look("time", lambda: read_time_sync(machine)),
        route=look("route", lambda: read_route(machine, bs)) if bs else None,
    )
    return facts, broken + judge(facts)


def document(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """The preflight as JSON: the facts, then what is wrong as `{check, text}`. Unknown is null, or "unknown"."""
    said = {
        f"{level}s": [{"check": finding.check, "text": finding.text} for finding in findings if finding.level == level]
        for level in ("warning", "problem")
    }
    return {"preflight": VERSION, "jetson": facts.is_jetson, **dataclasses.asdict(facts), **said}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    elsewhere = options.root != Path("/")
    commands = Commands(options.commands) if options.commands else NoCommands() if elsewhere else Commands()
    silent = options.no_cuda or (elsewhere and not options.commands)
    python = None if silent else str(Path(os.path.abspath(options.python)))  # noqa: PTH100 - a venv's link stays a link
    try:
        facts, findings = examine(Machine(options.root, commands), bs=options.bs, python=python)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(document(facts, findings)) if options.as_json else "\n".join(summary.lines(facts, findings)))
    return PROBLEMS if any(finding.level == "problem" for finding in findings) else WARNINGS if findings else FINE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m firmware_setup.preflight",
        description="Say what this board is, and what is wrong with it. As root it can tell whether clocks are locked. "
        "Not yet run on hardware.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bs", metavar="HOST", help="base station: say by which interface it is reached")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one line that is one JSON document")
    parser.add_argument("--python", default=sys.executable, help="interpreter the node runs on (default: this one)")
    parser.add_argument("--no-cuda", action="store_true", help="do not use the GPU: a run may be under way")
    parser.add_argument("--root", type=_folder, default=Path("/"), help="read files below this folder, run no commands")
    parser.add_argument(
        "--commands", type=_folder, metavar="FOLDER", help="run nvpmodel, iw, ... from this folder only"
    )
    return parser


def _folder(text: str) -> Path:
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return folder


if __name__ == "__main__":
    sys.exit(main())
