"""`testbed split`: a checkpoint into what the base station loads and one shard of experts per node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "Example: testbed split mistralai/Mixtral-8x7B-v0.1 --nodes nodes.toml --out mixtral-split --dry-run"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or OWNER/NAME on the hub.")],
    nodes: Annotated[
        Path, typer.Option(metavar="FILE", help="[[node]] tables: name, memory_gb, speed, weight_format, computes_on.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder that the split becomes; appears when it is whole.")] = None,
    placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="[placement] to use, as `testbed place --out` writes it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Store experts as float32, float16 or bfloat16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what memory each node needs and has; reads headers alone.")
    ] = False,
    trusted: Annotated[
        str | None, typer.Option("--trust-remote-code", metavar="NAME", help="Let this model run code of its own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
) -> None:
    """Split a checkpoint into a base station's part and one shard per node; goes on where it was interrupted."""
    import signal

    from testbed.checkpoint.nodes_file import load_nodes_file, load_placement
    from testbed.errors import ConfigError

    if out is None and not is_dry_run:
        raise ConfigError("split: name the folder to write, --out DIR, or only look with --dry-run")
    boards = load_nodes_file(nodes)
    given = None if placement is None else load_placement(placement, boards)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from testbed.checkpoint.families import DTYPES
    from testbed.checkpoint.fetching import fetch
    from testbed.checkpoint.job import Source
    from testbed.checkpoint.planning import Wishes, make_plan
    from testbed.checkpoint.split import run_split
    from testbed.checkpoint.split_costs import split_costs
    from testbed.cli.output import console, print_json_line

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: weights are stored in {', '.join(DTYPES)}")
    found = fetch(model, revision=revision, trusted=trusted, headers_only=is_dry_run)
    source = Source.of(found.folder, name=found.name, commit=found.commit, trusted=trusted)
    plan = make_plan(source, boards, Wishes(), given=given, dtype=dtype)
    display = console()
    costs = split_costs(plan.job, console(stderr=True), read_weights=not is_dry_run)
    document = {**plan.document(), **costs.document(), "written": None}
    if not as_json:
        display.print(plan.table())
        costs.show(display)
    if not source.has_tokenizer:
        console(stderr=True).print(
            f"warning: {model}: no tokenizer in it; the split works, but a run on text needs tokenizer.json in it",
            soft_wrap=True,
        )
    if out is not None and not is_dry_run:
        with bytes_bar(console(stderr=True)) as progress:
            manifest = run_split(plan.job, out, progress)
        document |= {"written": str(out), "model_hash": manifest.model_hash}
        if not as_json:
            display.print(f"written: {out} ({plan.job.total_bytes / 1e9:.2f} GB)", soft_wrap=True)
    elif not as_json:
        display.print(f"nothing was written: the split would take {plan.job.total_bytes / 1e9:.2f} GB", soft_wrap=True)
    if as_json:
        print_json_line(document)


@contextmanager
def bytes_bar(display: Console) -> Iterator[Callable[[int, int], None]]:
    """Calls (bytes done, bytes in all) become a bar with rate and time left on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("split"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=display, disable=not display.is_terminal) as progress:
        task = progress.add_task("split", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
