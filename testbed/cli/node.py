"""`testbed node`: the same program as `python -m jetson_node`, which reads the options itself."""

from __future__ import annotations

from typing import Any

import typer

PASS_ALL_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def command(context: typer.Context) -> None:
    """Run the experts of one device for a base station."""
    from jetson_node.__main__ import main

    raise typer.Exit(main(context.args))
