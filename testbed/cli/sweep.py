"""`testbed sweep`: a grid of runs over keys of a run file, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from testbed.sweep.results import SweepResults

EXAMPLE = "Example: testbed sweep configs/precision.toml --axis radio.placement.seed=1,2,3"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep, gone on with if it is there; default: in log.directory.")
    ] = None,
    is_measured: Annotated[
        bool, typer.Option("--measured/--simulated", help="Run the whole testbed at each point, or simulate it.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--axis", metavar="KEY=V1,V2", help="Vary a key, or KEY+KEY together; repeatable; [sweep] too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help='Simulate on this Ray cluster; "auto": on this machine\'s.')
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, max=10_000_000, help="Draws of the channel per point.")] = None,
) -> None:
    """Run or simulate every combination of values, go on where it was ended, and plot latency against quality."""
    import signal

    from testbed.errors import ConfigError
    from testbed.sweep.grid import load_grid

    for option, value in (("--ray", ray), ("--draws", draws)):
        if is_measured and value is not None:
            raise ConfigError(f"{option}: is for simulated points; leave it out, or --measured")
    grid = load_grid(file, overrides or (), axes or ())
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from contextlib import nullcontext

    from testbed.cli.output import console
    from testbed.sweep.points import Asked
    from testbed.sweep.ray_pool import ray_cluster
    from testbed.sweep.runner import measured, run_sweep, simulated

    folder = out or grid.base.log.directory / f"sweep-{grid.base.name}"
    asked = Asked("measured" if is_measured else "simulated", draws)
    run_point = measured(file, folder) if is_measured else simulated(draws)
    display = console(stderr=True)
    with nullcontext() if ray is None else ray_cluster(ray) as execute:
        results = run_sweep(
            grid, asked, folder, run_point, execute, tell=lambda line: display.print(line, soft_wrap=True)
        )
    _show(results, as_json=as_json)
    if results.failed:
        raise typer.Exit(1)


def _show(results: SweepResults, *, as_json: bool) -> None:
    from testbed.cli.output import console, print_json_line
    from testbed.sweep.results import write_parquet
    from testbed.sweep.table import sweep_notes, sweep_table

    written = [write_parquet(results)] if results.rows else []
    plots, hint = _write_plots(results)
    written += plots
    if as_json:
        print_json_line({**results.document(), "written": [str(path) for path in written]})
        return
    console().print(sweep_table(results))
    for note in [*sweep_notes(results), *hint, f"written: {', '.join(map(str, written)) or 'nothing'}"]:
        console().print(note, soft_wrap=True)


def _write_plots(results: SweepResults) -> tuple[list[Path], list[str]]:
    from testbed.sweep.plots import write_plots

    try:
        return write_plots(results), []
    except ModuleNotFoundError as error:
        return [], [f"no plots: {error.name} is not installed: pip install 'wdmoe-testbed[plots]', then the same again"]
