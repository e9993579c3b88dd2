"""`testbed run`: one run file, one run, one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from testbed.cli.run_on_boards import Ask, Load

EXAMPLE = "Example: testbed run configs/local.toml --set radio.placement.seed=2"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to put the run's log in; default: log.directory.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    placements: Annotated[
        int,
        typer.Option(min=1, max=1000, help="Run so many seeded placements and sum them up; needs [radio.placement]."),
    ] = 1,
    target_ms: Annotated[
        float | None, typer.Option("--target-ms", help="Steer theta or budget online to this mean time of a block.")
    ] = None,
    quality_budget: Annotated[
        float | None,
        typer.Option(help="Steer them to this mean share of gate mass dropped, or let it bound --target-ms."),
    ] = None,
    inventory: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Run on the boards of an Ansible inventory, whose nodes are up, by real links."
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No encryption, no keys; the log says so.")] = False,
) -> None:
    """Run every policy of a run file over its devices and compare them."""
    import signal
    from functools import partial

    from testbed.config import load_run_file

    steering = {"target_ms": target_ms, "quality_budget": quality_budget}
    changes = [*(overrides or ()), *(f"steering.{key}={value}" for key, value in steering.items() if value is not None)]
    load: Load = partial(load_run_file, file)
    boards: Ask | None = None
    if inventory is not None:
        from testbed.cli.run_on_boards import prepare

        load, boards = prepare(file, inventory)
    config = load(changes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does: nodes, keys and log included

    from testbed.cli.output import console, print_json_line
    from testbed.experiment.placements import over_placements
    from testbed.experiment.results import IncompleteRunError, Results
    from testbed.experiment.run import run_experiment
    from testbed.experiment.table import placements_notes, placements_table, results_notes, results_table

    incomplete: list[IncompleteRunError] = []

    def run(more: Sequence[str] = ()) -> Results:
        one, display = load([*changes, *more]), console(stderr=True)
        told = None if boards is None else boards(display)
        try:
            return run_experiment(one, config_path=file, out=out, insecure=insecure, display=display, boards=told)
        except IncompleteRunError as error:  # its figures are shown all the same
            incomplete.append(error)
            return error.results

    if placements > 1:
        placed = over_placements(config, placements, run)
        document, shown, notes = placed.document(), placements_table(placed), placements_notes(placed)
    else:
        results = run()
        document, shown, notes = results.document(), results_table(results), results_notes(results)
    if as_json:
        print_json_line(document)
    else:
        console().print(shown)
        for note in notes:
            console().print(note, soft_wrap=True)
    if incomplete:
        raise incomplete[0]
