"""`testbed run`: one run file, one run, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed run configs/local.toml"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to put the run's log in; default: log.directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="No encryption, no keys; the log says so.")] = False,
) -> None:
    """Run every policy of a run file over its devices and compare them."""
    import signal

    from testbed.config import load_run_file

    config = load_run_file(file)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does: nodes, keys and log included

    from testbed.cli.output import console, print_json_line
    from testbed.experiment.run import run_experiment

    results = run_experiment(config, config_path=file, out=out, insecure=insecure, display=console(stderr=True))
    if as_json:
        print_json_line(results.document())
    else:
        console().print(results.table())
        for note in results.notes():
            console().print(note, soft_wrap=True)
