"""`testbed run`: one run file, one run, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed run configs/local.toml --set radio.placement.seed=2"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to put the run's log in; default: log.directory.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="No encryption, no keys; the log says so.")] = False,
) -> None:
    """Run every policy of a run file over its devices and compare them."""
    import signal

    from testbed.config import load_run_file

    config = load_run_file(file, overrides or ())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does: nodes, keys and log included

    from testbed.cli.output import console, print_json_line
    from testbed.experiment.run import run_experiment
    from testbed.experiment.table import results_notes, results_table

    results = run_experiment(config, config_path=file, out=out, insecure=insecure, display=console(stderr=True))
    if as_json:
        print_json_line(results.document())
    else:
        console().print(results_table(results))
        for note in results_notes(results):
            console().print(note, soft_wrap=True)
