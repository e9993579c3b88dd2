"""`testbed logs`: what runs left behind. A subcommand is a file `logs_<name>.py`, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    "ls",
    "show",
    "report",
    "compare",
    "tail",
    "query",
    "export",
    "recover",
    "collect",
    "replay",
    "trace",
    "prune",
)
EXAMPLE = "Example: testbed logs ls && testbed logs tail latest"
DEFAULT_LOGS = Path("logs")

# What subcommands have in common.
LogsOption = Annotated[Path, typer.Option("--logs", metavar="FOLDER", help="The folder that holds the runs.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, its folder, or latest.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")]


def check_new_file(path: Path, *, force: bool) -> None:
    """Raises ConfigError where a file is there that must not be replaced, or where none can be."""
    from testbed.errors import ConfigError

    if path.exists() and (not force or path.is_dir()):
        raise ConfigError(f"{path}: is there already; --force replaces a file, or name another one with --out")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such folder; make it, or name another file")


class LateGroup(TyperGroup):
    """Knows its commands by name and imports the one that is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  (typer's signature)
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"testbed.cli.logs_{cmd_name}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name, epilog=module.EXAMPLE)(module.command)
        return typer.main.get_command(alone)


app = typer.Typer(cls=LateGroup, add_completion=False, rich_markup_mode=None, no_args_is_help=True, epilog=EXAMPLE)


@app.callback()
def _logs() -> None:
    """Look into the logs of runs."""
