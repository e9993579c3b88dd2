"""`testbed fleet`: boards of an inventory, looked at and looked after over ssh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from testbed.fleet.inventory import Board
    from testbed.fleet.remote import Answer

EXAMPLE = "Example: testbed fleet status --inventory lab.yml"
NONE = "-"
FAILED = 1

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Boards of an Ansible inventory, over ssh: all at once, no question asked.",
    epilog=EXAMPLE,
)
File = Annotated[Path, typer.Option("--inventory", "-i", metavar="FILE", help="Ansible inventory (YAML).")]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="Only this device; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")]


@app.command("status", epilog=EXAMPLE)
def status(inventory: File, hosts: Hosts = None, as_json: AsJson = False) -> None:
    """Say of every board whether its node runs, its power mode, clocks, temperature, Wi-Fi. Exit code 1 if not all."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.fleet.boards import look

    boards = _boards(inventory, hosts)
    with _hearing("asking", boards) as heard:
        rows = look(boards, heard)
    if as_json:
        print_json_line({"inventory": str(inventory), "boards": rows})
    else:
        columns = ["device", "address", "node", "restarts", "up", "mode", "clocks", "hottest", "Wi-Fi", "warnings"]
        console().print(table(_title(boards), columns, [_cells(row) for row in rows]))
        for row in rows:
            if row["error"]:
                console().print(f"{row['device']}: {row['error']}", soft_wrap=True)
    if not all(row["state"] == "active" for row in rows):
        raise typer.Exit(FAILED)


@app.command("restart", epilog="Example: testbed fleet restart --inventory lab.yml --host jetson-1")
def restart(inventory: File, hosts: Hosts = None, as_json: AsJson = False) -> None:
    """Restart the node's unit on every board."""
    from testbed.fleet.boards import restart_script, tell

    boards = _boards(inventory, hosts)
    with _hearing("restarting", boards) as heard:
        answers = tell(boards, restart_script, heard)
    done = {a.board.name: a.good for a in answers}
    _show_done(answers, as_json, {"restarted": done}, lambda _answer: "restarted")


@app.command("logs", epilog="Example: testbed fleet logs --inventory lab.yml --host jetson-1 --lines 50")
def logs(
    inventory: File,
    hosts: Hosts = None,
    lines: Annotated[int, typer.Option(min=1, max=10_000, help="The last so many lines of each board.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Print the last lines of every node's journal."""
    from testbed.fleet.boards import logs_script, tell

    boards = _boards(inventory, hosts)
    with _hearing("asking", boards) as heard:
        answers = tell(boards, lambda board: logs_script(board, lines), heard)
    said = {a.board.name: a.out.splitlines() if a.good else None for a in answers}
    _show_done(answers, as_json, {"lines": said}, lambda answer: "\n" + answer.out.rstrip())


@app.command("shape", epilog="Example: testbed fleet shape --inventory lab.yml --rate-mbit 20")
def shape(
    inventory: File,
    rate_mbit: Annotated[float | None, typer.Option("--rate-mbit", help="Mbit/s that each board may send.")] = None,
    is_lifted: Annotated[bool, typer.Option("--off", help="Lift the limit.")] = False,
    hosts: Hosts = None,
    as_json: AsJson = False,
) -> None:
    """Limit what every board sends on the interface to the base station, until it reboots. Not yet run on hardware."""
    from testbed.errors import ConfigError
    from testbed.fleet.board_shaping import HIGHEST_MBIT_PER_S, LOWEST_MBIT_PER_S, shape_script, shaped
    from testbed.fleet.boards import tell

    if (rate_mbit is None) is not is_lifted:
        raise ConfigError("shape: give a rate, --rate-mbit 20, or lift it with --off")
    if rate_mbit is not None and not LOWEST_MBIT_PER_S <= rate_mbit <= HIGHEST_MBIT_PER_S:
        raise ConfigError(f"--rate-mbit {rate_mbit:g}: from {LOWEST_MBIT_PER_S:g} to {HIGHEST_MBIT_PER_S:g}")
    boards = _boards(inventory, hosts)
    with _hearing("shaping", boards) as heard:
        answers = tell(boards, lambda board: shape_script(board, rate_mbit), heard)
    rows = [shaped(answer) for answer in answers]
    _show_done(answers, as_json, {"boards": rows}, lambda answer: answer.out.strip())


@app.command("split", epilog="Example: testbed fleet split configs/local.toml --inventory lab.yml")
def split(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    inventory: File,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Split the run file's model for the boards, as `testbed run --inventory` will, and name the folder to ship.

    A board needs manifest.json and the shard of its name.
    """
    from testbed.cli.output import console, print_json_line
    from testbed.experiment.model_split import split_model
    from testbed.fleet.inventory import read_inventory
    from testbed.fleet.on_inventory import load_on_inventory

    folder, manifest = split_model(load_on_inventory(file, overrides or (), read_inventory(inventory)))
    if as_json:
        print_json_line({"folder": str(folder), "devices": list(manifest.devices), "model_hash": manifest.model_hash})
    else:
        console().print(str(folder), soft_wrap=True)


def _boards(inventory: Path, hosts: list[str] | None) -> tuple[Board, ...]:
    from testbed.fleet.inventory import read_inventory

    return read_inventory(inventory).chosen(hosts or [])


def _title(boards: tuple[Board, ...]) -> str:
    virtual = sum(board.virtual for board in boards)
    return f"{len(boards)} boards" + (f", {virtual} of them virtual: clocks and temperatures synthetic" * (virtual > 0))


def _show_done(
    answers: list[Answer], as_json: bool, document: Mapping[str, Any], text: Callable[[Answer], str]
) -> None:
    """One line per board; exit code 1 where one failed."""
    from testbed.cli.output import console, print_json_line

    failed = {a.board.name: a.error or f"exit code {a.code}" for a in answers if not a.good}
    if as_json:
        print_json_line({**document, "failed": failed})
    else:
        for answer in answers:
            said = text(answer) if answer.good else f"failed: {failed[answer.board.name]}"
            console().print(f"{answer.board.name}: {said}", soft_wrap=True)
    if failed:
        raise typer.Exit(FAILED)


def _cells(row: Mapping[str, Any]) -> list[str]:
    preflight = row["preflight"] or {}
    state = row["state"] or ("unreachable" if not row["reached"] else NONE)
    uptime_s, restarts = row["uptime_s"], row["restarts"]
    power, clocks, thermal = (preflight.get(part) or {} for part in ("power", "clocks", "thermal"))
    locked, hottest_c = clocks.get("locked"), thermal.get("hottest_c")
    signals = [
        f"{wifi['signal_dbm']} dBm" for wifi in preflight.get("wifi") or [] if wifi.get("signal_dbm") is not None
    ]
    said = [*preflight.get("problems", []), *preflight.get("warnings", [])]
    return [
        row["device"],
        row["address"],
        state,
        NONE if restarts is None else str(restarts),
        NONE if uptime_s is None else f"{uptime_s / 3600:.1f} h",
        power.get("mode") or NONE,
        {True: "locked", False: "not locked", None: NONE}[locked],
        NONE if hottest_c is None else f"{hottest_c:.1f} °C",
        ", ".join(signals) or NONE,
        str(len(said)) if preflight else NONE,
    ]


@contextmanager
def _hearing(what: str, boards: tuple[Board, ...]) -> Iterator[Callable[[Answer], None]]:
    """A bar on a terminal: how many boards have answered."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from testbed.cli.output import console

    display = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=display, disable=not display.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=len(boards))
        yield lambda _answer: progress.advance(task)
