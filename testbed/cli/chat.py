"""`testbed chat`: talk with a model whose experts are on the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.generate import (
    DoSample,
    Insecure,
    MaxNewTokens,
    Out,
    Overrides,
    PolicyOption,
    RunFile,
    Seed,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from testbed.live.engine import Engine
    from testbed.live.model import LiveModel
    from testbed.live.prompting import Turn
    from testbed.live.sampling import Sampling
    from testbed.live.terminal import Interrupts

EXAMPLE = "Example: testbed chat configs/local.toml --do-sample --temperature 0.7"
DEMO = "this is the demo model: it continues Python source and understands nothing else; try: def read_lines(path):"


def command(
    file: RunFile,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    do_sample: DoSample = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 50,
    seed: Seed = None,
    policy: PolicyOption = None,
    out: Out = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Each answer is a line that is a JSON document.")] = False,
    insecure: Insecure = False,
) -> None:
    """Talk with a live model. Ctrl-C stops an answer, Ctrl-D ends; /new forgets the conversation."""
    import signal

    from testbed.config import load_run_file
    from testbed.live.options import with_policy

    config = with_policy(load_run_file(file, overrides or ()), policy)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from testbed.cli.output import console
    from testbed.live.model import live_model
    from testbed.live.sampling import Sampling

    sampling = Sampling(max_new_tokens, do_sample, temperature, top_k, top_p, seed)
    with live_model(config, config_path=file, out=out, insecure=insecure, text="a user's conversation") as live:
        told = console(stderr=True)
        if config.model.path == "demo":
            told.print(DEMO, style="dim", soft_wrap=True)
        elif live.tokenizer.chat_template is None:
            told.print("the model has no chat template: it continues what was said", style="dim", soft_wrap=True)
        told.print("Ctrl-C stops an answer, Ctrl-D ends, /new forgets the conversation", style="dim", soft_wrap=True)
        _converse(live, sampling, [] if system is None else [{"role": "system", "content": system}], as_json=as_json)


def _converse(live: LiveModel, sampling: Sampling, start: list[Turn], *, as_json: bool) -> None:
    from testbed.cli.output import console, print_json_line
    from testbed.errors import WdmoeError
    from testbed.live.engine import Engine
    from testbed.live.terminal import Interrupts, Lines

    engine, told, turns = Engine(live, max_batch=1), console(stderr=True), list(start)
    with Interrupts() as interrupts:
        lines = Lines(live.idle, interrupts)
        while (line := lines.next("> ")) is not None:
            if line.strip() == "/new":
                turns = list(start)
            if line.strip() in ("", "/new"):
                continue
            asked: Turn = {"role": "user", "content": line}
            try:
                text, facts = _answer(live, engine, sampling, [*turns, asked], interrupts, as_json=as_json)
            except WdmoeError as error:  # it has become too long, the template refuses it, or nodes are gone
                if not lines.interactive:
                    raise
                told.print(f"error: {error}; /new forgets the conversation", style="red", soft_wrap=True)
                continue
            turns += [asked, {"role": "assistant", "content": text}]
            if as_json:
                print_json_line(facts | {"text": text})


def _answer(
    live: LiveModel, engine: Engine, sampling: Sampling, turns: list[Turn], interrupts: Interrupts, *, as_json: bool
) -> tuple[str, dict[str, object]]:
    """Say it token by token, and how long it took. Ctrl-C ends it; what was said until then counts."""
    from testbed.cli.output import console
    from testbed.live.continuation import Continuation
    from testbed.live.figures import measured
    from testbed.live.prompting import chat_token_ids
    from testbed.live.text import Listener

    def show(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    ids_T = chat_token_ids(live.tokenizer, turns)
    heard = Listener(live.tokenizer, ids_T.tolist(), show)
    continuation = Continuation(ids_T, sampling, heard)
    engine.submit(continuation)
    while engine.step():
        continuation.cancelled |= interrupts.taken()  # between two tokens: a round is never torn
    show("\n")
    figures = measured(live, [continuation])
    if not as_json:
        console(stderr=True).print(figures.line(), style="dim", soft_wrap=True)
    return heard.text, figures.document() | {"finish_reason": continuation.finish_reason}
