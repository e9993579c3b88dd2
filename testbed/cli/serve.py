"""`testbed serve`: an OpenAI-compatible endpoint whose experts are on the nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.cli.generate import Insecure, Out, Overrides, RunFile

EXAMPLE = "Example: testbed serve configs/local.toml --policy wlr:theta=0.2"


def command(
    file: RunFile,
    host: Annotated[str, typer.Option(help="Address; another one than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="A key a line; clients must send one of them.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Speak HTTPS with this certificate (PEM, its chain).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key (PEM).")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Requests that share the rounds to the nodes.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, max=100_000, help="More are answered 429.")] = 64,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME:KEY=VALUE", help="Repeatable; default: all of the run file's."),
    ] = None,
    out: Out = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it serves as a JSON document.")] = False,
    insecure: Insecure = False,
) -> None:
    """Serve a live model to OpenAI's clients until Ctrl-C; requests that come together share the rounds."""
    import signal
    from contextlib import suppress

    from testbed.config import load_run_file
    from testbed.errors import ConfigError
    from testbed.live.options import policy_words, with_policies
    from testbed.serve.settings import ServeSettings, check_address, check_tls, read_keys

    config = with_policies(load_run_file(file, overrides or ()), policies or ())
    keys = () if api_key_file is None else read_keys(api_key_file)
    check_address(host, keys)
    tls = check_tls(tls_cert, tls_key)
    try:
        from testbed.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError(f"{error.name} is not installed: pip install 'wdmoe-testbed[serve]'") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from testbed.cli.output import console, print_json_line
    from testbed.live.model import live_model

    name = Path(config.model.path).name
    names = [name, *(f"{name}:{policy_words(policy)}" for policy in config.policies)]
    models = dict(zip(names, [0, *range(len(config.policies))], strict=True))
    with live_model(config, config_path=file, out=out, insecure=insecure, text="requests of clients") as live:

        def ready(address: str) -> None:
            if as_json:
                print_json_line({"address": address, "model": name, "models": names, "run": str(live.run_dir)})
                return
            told = console()
            told.print(f"{address} serves, until Ctrl-C", soft_wrap=True)
            told.print(f"  {name}, or by policy: {', '.join(names[1:])}", soft_wrap=True)
            told.print(f"every round: testbed watch, or testbed logs show {live.run_dir}", style="dim", soft_wrap=True)

        with suppress(KeyboardInterrupt):
            serve(live, ServeSettings(host, port, models, keys, batch, max_waiting, tls), ready)
