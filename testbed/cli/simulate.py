"""`testbed simulate`: what a run would take, computed in seconds; or whether that is what a finished run took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed simulate configs/paper.toml --placements 10"


def command(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The run file.", show_default=False)] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000_000,
            show_default=False,
            help="Draws of the channel; default 10000, or 200 where a policy is not compiled.",
        ),
    ] = None,
    placements: Annotated[int, typer.Option(min=1, max=100_000, help="Seeded placements to spread them over.")] = 1,
    routing: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run's folder: its gate's choices, not a fresh pass.")
    ] = None,
    quality: Annotated[bool, typer.Option(help="Run the model here under each policy: perplexity, accuracy.")] = True,
    check: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Instead: compare the model with this emulated run, by rounds.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
) -> None:
    """Compute what each policy of a run file would take: the analytic model, no sockets, no waiting."""
    from testbed.errors import ConfigError

    if (file is None) == (check is None):
        raise ConfigError("simulate: name either a run file or, with --check, the folder of a finished run")
    if check is not None:
        _check(check, as_json)
    elif file is not None:
        _simulate(file, draws, placements, routing, quality, overrides or [], as_json)


def _check(run_dir: Path, as_json: bool) -> None:
    from testbed.cli.output import console, print_json_line
    from testbed.simulation.check import check_run
    from testbed.simulation.table import check_notes, check_table

    results = check_run(run_dir)
    if as_json:
        print_json_line(results.document())
        return
    console().print(check_table(results))
    for note in check_notes(results):
        console().print(note, soft_wrap=True)


def _simulate(
    file: Path,
    draws: int | None,
    placements: int,
    routing: Path | None,
    quality: bool,
    overrides: list[str],
    as_json: bool,
) -> None:
    from testbed.config import load_run_file

    config = load_run_file(file, overrides)

    from testbed.cli.output import console, print_json_line
    from testbed.experiment.run import progress_bar
    from testbed.simulation.simulate import default_draws, simulate
    from testbed.simulation.table import simulation_notes, simulation_table

    with progress_bar(console(stderr=True)) as progress:
        results = simulate(
            config,
            draws=draws or max(default_draws(config), placements),
            placements=placements,
            quality=quality,
            routing=routing,
            progress=progress,
        )
    if as_json:
        print_json_line(results.document())
        return
    console().print(simulation_table(results))
    for note in simulation_notes(results):
        console().print(note, soft_wrap=True)
