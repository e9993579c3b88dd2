"""`testbed eval`: tasks of lm-evaluation-harness on the distributed model, accuracy and latency of every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: testbed eval configs/eval.toml --tasks stdlib --limit 20 --policy wlr:theta=0.2"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)],
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of lm-evaluation-harness, by comma; stdlib: offline ones.")
    ] = "stdlib",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items of each task.")] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME[:KEY=VALUE]", help="Instead of the run file's, after topk; repeatable."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=100, help="Examples before each item, if tasks allow.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Sequences in one call of the model.")] = 1,
    include: Annotated[Path | None, typer.Option(help="A folder with task files (YAML) of your own.")] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Allow tasks that run, on this machine, code that the model wrote.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to put the run's log in; default: log.directory.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="No encryption, no keys; the log says so.")] = False,
) -> None:
    """Ask every policy of a run file the same items over its devices; compare accuracy and measured latency."""
    import importlib.util
    import os
    import signal

    from testbed.config import load_run_file
    from testbed.errors import ConfigError
    from testbed.evaluation.policies import policies_override

    config = load_run_file(file, [*(overrides or ()), *policies_override(policies or ())])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does: nodes, keys and log included
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("eval: lm-evaluation-harness is not installed: pip install 'wdmoe-testbed[eval]'")
    os.environ.setdefault("TQDM_DISABLE", "1")  # there is one bar, ours

    from testbed.cli.output import console, print_json_line
    from testbed.experiment.run import make_policies

    made = make_policies(config)  # a mistake in them is told before tasks are looked for

    from testbed.evaluation.run import evaluate_policies
    from testbed.evaluation.table import evaluation_notes, evaluation_table
    from testbed.evaluation.tasks import Asked, load_units

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    asked = Asked(load_units(names, include, shots, allow_code=run_code), limit, batch_size, run_code)
    results, written = evaluate_policies(
        config, made, asked, config_path=file, out=out, insecure=insecure, display=console(stderr=True)
    )
    if as_json:
        print_json_line({**results.document(), "written": [str(path) for path in written]})
    else:
        console().print(evaluation_table(results))
        for note in [*evaluation_notes(results), f"written: {', '.join(map(str, written))}"]:
            console().print(note, soft_wrap=True)
