"""The `testbed` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from testbed.cli import (
    chat,
    doctor,
    fleet,
    generate,
    keys,
    logs,
    node,
    place,
    probe,
    rack,
    run,
    serve,
    simulate,
    split,
    sweep,
    watch,
)
from testbed.cli import eval as evaluation
from testbed.errors import WdmoeError

INTERRUPTED = 130
EXTRAS = {"torch", "transformers", "accelerate", "tokenizers", "duckdb", "vl_convert", "prometheus_client", "yaml"}

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Example: testbed doctor configs/local.toml && testbed run configs/local.toml",
)
app.command("run", epilog=run.EXAMPLE)(run.command)
app.command("sweep", epilog=sweep.EXAMPLE)(sweep.command)
app.command("eval", epilog=evaluation.EXAMPLE)(evaluation.command)
app.command("generate", epilog=generate.EXAMPLE)(generate.command)
app.command("chat", epilog=chat.EXAMPLE)(chat.command)
app.command("serve", epilog=serve.EXAMPLE)(serve.command)
app.command("simulate", epilog=simulate.EXAMPLE)(simulate.command)
app.command("watch", epilog=watch.EXAMPLE)(watch.command)
app.command("place", epilog=place.EXAMPLE)(place.command)
app.command("split", epilog=split.EXAMPLE)(split.command)
app.command("probe", epilog=probe.EXAMPLE)(probe.command)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.command)
app.add_typer(logs.app, name="logs")
app.add_typer(rack.app, name="rack")
app.add_typer(fleet.app, name="fleet")
app.command("keys", epilog=keys.EXAMPLE)(keys.command)
app.command("node", context_settings=node.PASS_ALL_ON, add_help_option=False)(node.command)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"testbed {version('wdmoe-testbed')}")
        raise typer.Exit


@app.callback()
def _testbed(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Mixture-of-experts inference over a base station and many devices, measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; a user's mistake is one line on stderr.

    TESTBED_TRACEBACK=1 shows where in the code a mistake was found.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=arguments or ["--help"], prog_name="testbed", standalone_mode=False) or 0
    except WdmoeError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "testbed")
        return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _fail(f"{error.name} is not installed: pip install 'wdmoe-testbed[bs]' (not on a Jetson)", 1)
    except OSError as error:
        return _fail(f"{error}; TESTBED_TRACEBACK=1 shows where", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    return _fail("interrupted", code) if code == INTERRUPTED else code


def _fail(text: str, exit_code: int) -> int:
    if os.environ.get("TESTBED_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return exit_code
