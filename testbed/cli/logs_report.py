"""`testbed logs report`: a run as one page of figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.cli.logs import DEFAULT_LOGS, ForceOption, JsonOption, LogsOption, RunArgument, check_new_file

EXAMPLE = "Example: testbed logs report latest --out report.html --figures figures"


def command(
    run: RunArgument = "latest",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file; default: report.html in the run's folder.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write each figure as PNG and SVG into this folder.")
    ] = None,
    force: ForceOption = False,
    logs: LogsOption = DEFAULT_LOGS,
    as_json: JsonOption = False,
) -> None:
    """Draw a run as one HTML file that opens with no network: figures, what is emulated, and the SQL of each number."""
    from testbed.cli.output import console, print_json_line, table
    from testbed.errors import ConfigError
    from testbed.runlog.catalog import find_run

    run_dir = find_run(run, logs)
    page = out or run_dir / "report.html"
    check_new_file(page, force=force)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ConfigError(f"{figures}: is a file; name a folder for the figures")

    from testbed.report import build
    from testbed.report.data import RunData

    data = RunData(run_dir)
    drawn = build.figures_of(data)
    build.write_page(data, drawn, page)
    images = build.write_images(drawn, figures) if figures is not None else []
    if as_json:
        print_json_line(
            {
                "run": data.run.run,
                "state": data.run.state.value,
                "file": str(page),
                "bytes": page.stat().st_size,
                "figures": [{"name": one.name, "drawn": one.spec is not None, "finding": one.finding} for one in drawn],
                "images": [str(path) for path in images],
            }
        )
        return
    rows = [(one.title, "yes" if one.spec else "-", one.finding) for one in drawn]
    shown = table(f"Report of {data.run.run} ({data.run.state.value})", ("figure", "drawn", "what it shows"), rows)
    for column in shown.columns[1:]:
        column.justify, column.no_wrap = "left", False
    console().print(shown)
    more = f"; {len(images)} images in {figures}" if figures is not None else ""
    console().print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, opens in a browser, no network{more}", soft_wrap=True)
