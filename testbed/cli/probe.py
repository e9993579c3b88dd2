"""`testbed probe`: what each link and each node can do, and what a round should cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed probe configs/local.toml --rows 1 --rows 16 --rows 64"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a block; repeatable (default 1, 4, 16, 64).")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Blocks of each size.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder to put the log in; default: log.directory.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="No encryption, no keys; the log says so.")] = False,
) -> None:
    """Measure every link by message size and every node by rows, fit both, say what a round should cost."""
    import signal

    from testbed.config import load_run_file
    from testbed.errors import ConfigError

    config = load_run_file(file, overrides or ())
    sizes = sorted(set(rows or (1, 4, 16, 64)))
    if sizes[0] < 1 or sizes[-1] > 65_536:
        raise ConfigError(f"--rows {sizes[0] if sizes[0] < 1 else sizes[-1]}: from 1 to 65536 rows make a block")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from testbed.cli.output import console, print_json_line
    from testbed.experiment.probe import run_probe
    from testbed.experiment.run import progress_bar

    with progress_bar(console(stderr=True)) as progress:
        results = run_probe(
            config, config_path=file, out=out, insecure=insecure, rows_list=sizes, repeats=repeats, progress=progress
        )
    if as_json:
        print_json_line(results.document())
    else:
        console().print(results.table())
        for note in results.notes():
            console().print(note, soft_wrap=True)
