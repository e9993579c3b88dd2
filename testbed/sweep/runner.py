"""Run the points of a sweep that are not done yet, and keep each as it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from testbed.config import RunConfig
from testbed.sweep.grid import Grid, Point
from testbed.sweep.points import Asked, Outcome, PointRunner, attempt, point_store
from testbed.sweep.results import SweepResults, collect

Execute = Callable[[Sequence[Point], PointRunner], Iterator[tuple[Point, Outcome]]]
Tell = Callable[[str], None]


def run_sweep(
    grid: Grid, asked: Asked, out: Path, run_point: PointRunner, execute: Execute | None = None, tell: Tell = print
) -> SweepResults:
    """Run what is missing of a sweep in `out` and return the figures of all of it, read back from its files.

    `execute` says where points run (default: here, one after another); `tell` is given one line per finished point.
    Raises ConfigError where `out` holds another sweep.
    """
    with point_store(out, grid, asked) as store:
        missing = [point for point in grid.points if not store.is_done(point)]
        done = len(grid.points) - len(missing)
        if done:
            tell(f"{done} of {len(grid.points)} points are already in {out}")
        try:
            for number, (point, outcome) in enumerate((execute or one_after_another)(missing, run_point), 1):
                store.keep(point, outcome)
                became = f"{outcome.seconds:.1f} s" if outcome.reason is None else f"failed: {outcome.reason}"
                tell(f"{done + number}/{len(grid.points)} {point}: {became}")
        except KeyboardInterrupt:
            kept = sum(map(store.is_done, grid.points))
            tell(f"{kept} of {len(grid.points)} points are kept in {out}; the same command goes on from there")
            raise
        return collect(grid, store, new=len(missing))


def one_after_another(points: Sequence[Point], run_point: PointRunner) -> Iterator[tuple[Point, Outcome]]:
    """Run points in this process."""
    for point in points:
        yield point, attempt(run_point, point.config)


def simulated(draws: int | None) -> PointRunner:
    """Points are simulated: no sockets, no waiting. draws: of the channel, as in `testbed simulate`."""
    return partial(_simulate, draws)


def _simulate(draws: int | None, config: RunConfig) -> Mapping[str, Any]:
    from testbed.simulation.simulate import default_draws, simulate  # noqa: PLC0415  (torch)

    return simulate(config, draws=draws or default_draws(config)).document()


def measured(file: Path, out: Path) -> PointRunner:
    """Points are runs of the whole testbed; each keeps its log under `out`."""
    return partial(_measure, file, out / "runs")


def _measure(file: Path, logs: Path, config: RunConfig) -> Mapping[str, Any]:
    from testbed.cli.output import console  # noqa: PLC0415
    from testbed.experiment.run import run_experiment  # noqa: PLC0415  (torch, ZeroMQ)

    display = console(stderr=True)
    results = run_experiment(config, config_path=file, out=logs, insecure=False, display=display)
    return {"kind": "measured", **results.document()}
