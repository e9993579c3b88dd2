"""`testbed rack`: virtual boards on this machine, to provision, run and break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from testbed.fleet.rack import Rack

EXAMPLE = "Example: sudo testbed rack up --nodes 4 && testbed rack status && testbed rack down"
UP_EXAMPLE = "Example: testbed rack up --nodes 4 --rate-mbit 20 --inventory lab.yml"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Virtual boards on this machine (root): containers with systemd, ssh and a Jetson's files, no Jetsons.",
    epilog=EXAMPLE,
)
Name = Annotated[str, typer.Option("--name", help="Which rack, where there are several.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line that is one JSON document.")]


class BaseName(str, Enum):
    debian = "debian"
    ubuntu = "ubuntu"


@app.command("up", epilog=UP_EXAMPLE)
def up(
    nodes: Annotated[int, typer.Option(help="How many boards.")] = 4,
    rate_mbit: Annotated[
        float | None,
        typer.Option(
            "--rate-mbit", help="Limit every link to so many Mbit/s of payload, each way; no delay, which needs netem."
        ),
    ] = None,
    base: Annotated[
        BaseName, typer.Option(help="Debian 12, or Ubuntu 22.04 (JetPack 6's; not run by the tests).")
    ] = BaseName.debian,
    bare: Annotated[bool, typer.Option("--bare", help="Without Python packages: boards to be provisioned.")] = False,
    internet: Annotated[
        bool,
        typer.Option("--internet", help="Let boards reach what this machine does: forwarding and NAT till `down`."),
    ] = False,
    inventory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the Ansible inventory; default: `rack status`.")
    ] = None,
    subnet: Annotated[str | None, typer.Option(help="Addresses; default: free ones of 198.18.0.0/15.")] = None,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="Package mirror; default: the distribution's.")
    ] = None,
    keyring: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys of the archive, where this machine lacks them.")
    ] = None,
    name: Name = "rack",
    as_json: AsJson = False,
) -> None:
    """Boot virtual boards and write their inventory. The first time takes minutes, then seconds."""
    import time

    from testbed.cli.output import console, print_json_line

    rack = _rack(name)
    started_s = time.monotonic()
    with _doing("rack up") as say:
        plan = rack.up(
            nodes, say, base=base.value, bare=bare, rate_mbit_per_s=rate_mbit, internet=internet, subnet=subnet,
            inventory=inventory, mirror=mirror, keyring=keyring,
        )  # fmt: skip
    took_s = time.monotonic() - started_s
    if as_json:
        document = {"rack": name, "devices": list(plan.devices), "inventory": plan.inventory, "subnet": plan.subnet}
        print_json_line({**document, "virtual": True, "took_s": took_s})
    else:
        console().print(f"{nodes} virtual boards answer ssh after {took_s:.1f} s: {plan.inventory}", soft_wrap=True)


@app.command("down", epilog="Example: testbed rack down")
def down(name: Name = "rack", as_json: AsJson = False) -> None:
    """Remove boards, network, mounts and inventory, also what a killed `rack up` left. What was built stays cached."""
    from testbed.cli.output import console, print_json_line

    with _doing("rack down") as say:
        there = _rack(name).down(say)
    if as_json:
        print_json_line({"rack": name, "was_there": there})
    else:
        console().print(f"rack {name}: {'removed' if there else 'there was none'}")


@app.command("status", epilog="Example: testbed rack status --json")
def status(name: Name = "rack", as_json: AsJson = False) -> None:
    """Say of every board whether it is on, linked and answers."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.fleet.rack import status as look

    rack = _rack(name)
    rows, plan = look(rack.devices()), rack.plan
    inventory = None if plan is None else plan.inventory
    if as_json:
        print_json_line({"rack": name, "virtual": True, "inventory": inventory, "devices": rows})
        return
    columns = ["device", "address", "power", "link", "ssh"]
    cells = [[row["device"], row["address"], row["power"], row["link"], "yes" if row["ssh"] else "no"] for row in rows]
    console().print(table(f"Rack {name}, virtual boards", columns, cells))
    console().print(f"inventory: {inventory}", soft_wrap=True)


def _fault(verb: str, done: str, text: str) -> None:
    """A command that does one thing to one board."""

    @app.command(verb, help=text, epilog=f"Example: testbed rack {verb} jetson-1")
    def command(
        device: Annotated[str, typer.Argument(help="Name of the board.", show_default=False)],
        name: Name = "rack",
        as_json: AsJson = False,
    ) -> None:
        from testbed.cli.output import console, print_json_line
        from testbed.fleet.rack_system import require_means

        require_means()
        rack = _rack(name)
        board = rack.device(device)
        if verb == "reboot":
            board.reboot(rack.boot_arguments())
        else:
            getattr(board, verb)()
        if as_json:
            print_json_line({"rack": name, "device": device, "power": board.power, "link_up": board.link_up})
        else:
            console().print(f"{device}: {done}")


_fault("freeze", "frozen", "Hang a board: its kernel accepts connections, no program answers.")
_fault("thaw", "thawed", "Let a frozen board go on.")
_fault("cut", "link cut", "Cut a board's link.")
_fault("mend", "link mended", "Mend a board's link.")
_fault("reboot", "answers ssh again", "Reboot a board, or switch it on, and wait until it answers.")
_fault("kill", "power cut", "Cut a board's power: all its processes end at once.")


def _rack(name: str) -> Rack:
    from testbed.fleet.rack import Rack

    return Rack(name)


@contextmanager
def _doing(title: str) -> Iterator[Callable[[str], None]]:
    """What is being done, as a bar on a terminal; elsewhere only what takes long is told, a line each."""
    import signal

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from testbed.cli.output import console

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    display = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]:.70}"))
    with Progress(*columns, console=display, disable=not display.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None, now="")

        def say(text: str) -> None:
            progress.update(task, now=text)
            if not display.is_terminal and text.endswith(" once"):
                display.print(text, soft_wrap=True)

        yield say
