"""Flash a board from this host: python -m firmware_setup.flash. Without --execute it only prints the commands.

Exit codes: 0 done or printed; 2 wrong usage; 4 refused; 5 a step failed; 130 interrupted. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from firmware_setup.flash.boards import TARGETS, RefusedError
from firmware_setup.flash.plan import PASSWORD, Account, Plan, check_boards, make_plan, obstacles
from firmware_setup.flash.usb import find_boards
from firmware_setup.l4t import jetpack_of
from firmware_setup.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

DONE, REFUSED, FAILED, INTERRUPTED = 0, 4, 5, 130
NOT_RUN = "not yet run on hardware"
EPILOG = """without a board's name it lists the NVIDIA boards on USB.
exit codes: 0 done or printed; 2 wrong usage; 4 refused; 5 a step failed; 130 interrupted.

example: python3 -m firmware_setup.flash orin-nano --super --release 36.4.3 --bsp ~/Linux_for_Tegra \\
           --user wdmoe --hostname jetson-0 --password-file ~/jetson-password"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.board is None:
        return _list(options)
    if options.release is None:
        parser.error("--release: which L4T is to be flashed, for instance 36.4.3")
    login = (options.user, options.hostname, options.password_file)
    if any(login) and not all(login):
        parser.error("--user, --hostname and --password-file go together")
    if options.execute and options.as_json:
        parser.error("--json tells what would be run; it does not go with --execute")
    try:
        return _flash(options)
    except RefusedError as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted; a board that was being flashed must be flashed again", file=sys.stderr)
        return INTERRUPTED


def _list(options: argparse.Namespace) -> int:
    boards = find_boards(Machine(options.root))
    if options.as_json:
        print(json.dumps({"boards": [dataclasses.asdict(board) for board in boards]}))
    else:
        print("\n".join(f"USB {board.place}: {board.state}, {board.module} ({board.product})" for board in boards)
              or "no NVIDIA board on USB; is it in recovery mode, and the cable one for data?")  # fmt: skip
    return DONE


def _flash(options: argparse.Namespace) -> int:
    account = Account(options.user, options.hostname, options.password_file) if options.user else None
    plan = make_plan(
        options.board,
        options.release,
        options.bsp.absolute(),
        storage=options.storage,
        super_mode=options.super_mode,
        account=account,
    )
    boards = find_boards(Machine(options.root))
    check_boards(plan, boards)
    hindered = obstacles(plan, boards)
    _show(plan, hindered, as_json=options.as_json)
    if not options.execute:
        return DONE
    if hindered:
        raise RefusedError("; ".join(hindered))
    password = account.password() if account else None
    _confirm(plan, boards[0].place)
    return _execute(plan, password, Machine(options.root))


def _show(plan: Plan, hindered: list[str], *, as_json: bool) -> None:
    if as_json:
        known = {"board": plan.target.name, "l4t": plan.release, "jetpack": jetpack_of(plan.release)}
        print(json.dumps({**known, "run_on_hardware": False, "commands": plan.shell_lines(), "obstacles": hindered}))
        return
    print(f"# {plan.target.name}, L4T {plan.release}, JetPack {jetpack_of(plan.release)}; {NOT_RUN}")
    print("\n".join(plan.shell_lines()))
    for obstacle in hindered:
        print(f"not ready: {obstacle}", file=sys.stderr)


def _confirm(plan: Plan, place: str) -> None:
    print(
        f"Everything on the board at USB {place} will be lost. Type {plan.target.name} to flash it: ",
        end="",
        flush=True,
    )
    if sys.stdin.readline(256).strip() != plan.target.name:
        raise RefusedError("not confirmed; nothing was done")


def _execute(plan: Plan, password: str | None, machine: Machine) -> int:
    for step in plan.steps:
        if step is plan.steps[-1]:  # the steps before it took minutes
            check_boards(plan, find_boards(machine))
        words = [password or "" if word == PASSWORD else word for word in step]
        try:
            code = subprocess.run(words, cwd=plan.bsp, check=False).returncode
        except OSError as error:
            print(f"{step[1]} does not start: {error}", file=sys.stderr)
            return FAILED
        if code:
            print(f"{step[1]} ended with code {code}; nothing after it was run", file=sys.stderr)
            return FAILED
    print("flashed; the board starts by itself, except Thor, which wants a reset")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m firmware_setup.flash",
        description=f"Print the commands that flash a board, or run them (--execute). {NOT_RUN.capitalize()}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("board", nargs="?", choices=sorted(TARGETS), help="what is to be flashed")
    parser.add_argument("--release", metavar="L4T", help="for instance 36.4.3")
    parser.add_argument("--storage", choices=("nvme", "emmc"), help="default: nvme, on agx-orin emmc")
    parser.add_argument("--super", dest="super_mode", action="store_true", help="Orin Nano and NX: with MAXN_SUPER")
    parser.add_argument("--bsp", type=Path, default=Path("Linux_for_Tegra"), help="unpacked Jetson Linux")
    parser.add_argument("--user", help="login to make, so that the first boot asks nothing")
    parser.add_argument("--hostname", help="the board's name")
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="holds that login's password")
    parser.add_argument("--execute", action="store_true", help="run the commands, after typing the board's name")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one line that is one JSON document")
    parser.add_argument("--root", type=Path, default=Path("/"), help="look for USB below this folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
