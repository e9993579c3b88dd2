"""`testbed place`: which node holds which experts, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed place ./mixtral --nodes nodes.toml --usage logs/RUN --speeds logs/RUN --out placement.toml"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or OWNER/NAME on the hub.")],
    nodes: Annotated[
        Path, typer.Option(metavar="FILE", help="[[node]] tables: name, memory_gb, speed, weight_format, computes_on.")
    ],
    usage: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run's folder: how often its gate chose each expert.")
    ] = None,
    speeds: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run's or probe's folder, or probe.json: each node's speed.")
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(min=1, max=64, help="Copies of an expert at most, where memory is left and a block gets shorter."),
    ] = 1,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Place every layer by itself.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write [placement] there, as TOML.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    trusted: Annotated[
        str | None, typer.Option("--trust-remote-code", metavar="NAME", help="Let this model run code of its own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
) -> None:
    """Place a model's experts by memory, then by speed and use, and explain it; reads headers, no weights."""
    from testbed.checkpoint.nodes_file import load_nodes_file
    from testbed.errors import ConfigError

    boards = load_nodes_file(nodes)
    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: is there already; name another file, or remove it")

    from testbed.checkpoint.fetching import fetch
    from testbed.checkpoint.job import Source
    from testbed.checkpoint.planning import Wishes, make_plan
    from testbed.cli.output import console, print_json_line

    found = fetch(model, revision=revision, trusted=trusted, headers_only=True)
    source = Source.of(found.folder, name=found.name, commit=found.commit, trusted=trusted)
    plan = make_plan(source, boards, Wishes(usage, speeds, replicas, by_layer), dtype=None)
    if out is not None:
        out.write_text(plan.as_toml())
    if as_json:
        print_json_line({**plan.document(), "written": None if out is None else str(out)})
        return
    display = console()
    display.print(plan.table())
    for line in [*plan.reasons, *([] if out is None else [f"written: {out}"])]:
        display.print(line, soft_wrap=True)
