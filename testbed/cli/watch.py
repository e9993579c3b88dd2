"""`testbed watch`: a running testbed on a terminal, and for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, LogsOption, RunArgument

if TYPE_CHECKING:
    from testbed.watch.figures import Figures

EXAMPLE = "Example: testbed watch latest --prometheus 9464"
LOOPBACK = "127.0.0.1"


def command(
    run: RunArgument = "latest",
    every_s: Annotated[
        float, typer.Option("--every", metavar="S", min=0.1, max=3600, help="Look again after so many seconds.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end, also of a run that has ended.")] = False,
    prometheus: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=0, max=65_535, help="Serve the figures at this port too; 0: any free one."),
    ] = None,
    prometheus_host: Annotated[str, typer.Option(metavar="HOST", help="Address to serve them at.")] = LOOPBACK,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: Annotated[bool, typer.Option("--json", help="Each view is a line that is a JSON document.")] = False,
) -> None:
    """Watch a run until it ends: nodes, links, estimates, drops, speed. Reads its log only; Ctrl-C ends it."""
    import signal
    from contextlib import ExitStack, suppress

    from testbed.cli.output import console, print_json_line
    from testbed.errors import ConfigError
    from testbed.runlog.catalog import find_run
    from testbed.watch.tail import watch

    if once and prometheus is not None:
        raise ConfigError("--once shows one view and ends, and --prometheus serves many: leave one of them out")
    run_dir, display = find_run(run, logs), console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shows: list[Callable[[Figures], None]] = []
    with suppress(KeyboardInterrupt), ExitStack() as open_until_end:
        if prometheus is not None:
            from testbed.watch.metrics import metrics_endpoint

            address, show = open_until_end.enter_context(metrics_endpoint(prometheus_host, prometheus))
            console(stderr=True).print(f"metrics at {address}", soft_wrap=True)
            shows.append(show)
        if as_json:
            shows.append(lambda figures: print_json_line(figures.document()))
        else:
            from testbed.watch.view import live_view, view

            shows.append(
                (lambda figures: display.print(view(figures)))
                if once
                else open_until_end.enter_context(live_view(display))
            )
        for figures in watch(run_dir, every_s, once=once):
            for show in shows:
                show(figures)
