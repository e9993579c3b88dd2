"""`testbed generate`: continue prompts with the experts on the nodes, and say how long it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from testbed.config import RunConfig
    from testbed.live.continuation import Continuation
    from testbed.live.engine import Engine
    from testbed.live.model import LiveModel
    from testbed.live.sampling import Sampling
    from testbed.live.text import Listener

EXAMPLE = "Example: testbed generate configs/local.toml --prompt 'def main(' --policy wlr:theta=0.2"

RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).", show_default=False)]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", metavar="NAME:KEY=VALUE", help="Default: the run file's first.", show_default=False),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many tokens for each prompt.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Draw the next token; else it is the likeliest one.")]
Temperature = Annotated[float, typer.Option(min=0.01, max=100.0, help="With --do-sample: above 1 is more random.")]
TopP = Annotated[float, typer.Option(min=0.001, max=1.0, help="With --do-sample: from the likeliest of this mass.")]
TopK = Annotated[int, typer.Option(min=0, max=1_000_000, help="With --do-sample: from so many likeliest; 0: all.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**63 - 1, help="With --do-sample: draws that come again.", show_default=False),
]
Out = Annotated[Path | None, typer.Option(help="Folder to put the log in; default: log.directory.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the run file; repeatable.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="No encryption, no keys; the log says so.")]


def command(
    file: RunFile,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='A prompt a line, or {"prompt": ...} a line of a .jsonl file.')
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    do_sample: DoSample = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 50,
    seed: Seed = None,
    policy: PolicyOption = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="So many prompts at a time; others wait.")] = 8,
    embed_locally: Annotated[
        bool,
        typer.Option("--embed-locally", help="The base station gets embeddings, not ids. No privacy: it can undo it."),
    ] = False,
    out: Out = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line that is one JSON document.")] = False,
    insecure: Insecure = False,
) -> None:
    """Continue prompts, several at a time, with a model whose experts are on the nodes."""
    import signal

    from testbed.config import load_run_file
    from testbed.errors import ConfigError
    from testbed.live.options import read_prompts, with_policy

    config = with_policy(load_run_file(file, overrides or ()), policy)
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    if not texts:
        raise ConfigError("generate: name a --prompt to continue, or a file of --prompts")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from testbed.live.model import live_model
    from testbed.live.sampling import Sampling

    sampling = Sampling(max_new_tokens, do_sample, temperature, top_k, top_p, seed)
    said = "a user's prompts" + (", embedded by the user: ids were not sent" if embed_locally else "")
    with live_model(config, config_path=file, out=out, insecure=insecure, text=said) as live:
        answers = _asked(live, texts, sampling, embed_locally=embed_locally, show=not as_json and len(texts) == 1)
        _answer(live, answers, batch, quiet=as_json)
        _report(live, config, answers, as_json=as_json)


class Answered(NamedTuple):
    prompt: str
    continuation: Continuation
    heard: Listener


def _asked(live: LiveModel, texts: list[str], sampling: Sampling, *, embed_locally: bool, show: bool) -> list[Answered]:
    """`show`: print the text as its tokens come."""
    from testbed.live.continuation import Continuation
    from testbed.live.prompting import UserSide, token_ids_of
    from testbed.live.text import Listener

    user = UserSide(live) if embed_locally else None
    answers = []
    for text in texts:
        ids_T = token_ids_of(live.tokenizer, text)
        heard = Listener(live.tokenizer, ids_T.tolist(), *([_print_on] if show else []))
        given = ids_T if user is None else user.embed(ids_T)
        answers.append(Answered(text, Continuation(given, sampling, heard), heard))
    return answers


def _print_on(piece: str) -> None:
    print(piece, end="", flush=True)


def _answer(live: LiveModel, answers: list[Answered], batch: int, *, quiet: bool) -> None:
    """A lone prompt is shown as its tokens come, of several each one when those before it are done."""
    from testbed.live.engine import Engine

    engine, several = Engine(live, batch), len(answers) > 1
    for number, answer in enumerate(answers):
        _submit(engine, answer.continuation, f"prompt {number}: " if several else "")
    if quiet:
        engine.run()
        return
    if not several:
        _print_on(answers[0].prompt)
    printed = 0
    while engine.step():
        while printed < len(answers) and answers[printed].continuation.finish_reason:
            answer = answers[printed]
            print(f"[{printed}] {answer.prompt}{answer.heard.text}" if several else "", flush=True)
            printed += 1


def _submit(engine: Engine, continuation: Continuation, which: str) -> None:
    from testbed.errors import ConfigError

    try:
        engine.submit(continuation)
    except ConfigError as error:
        raise ConfigError(f"{which}{error}") from error


def _report(live: LiveModel, config: RunConfig, answers: list[Answered], *, as_json: bool) -> None:
    from testbed.cli.output import console, print_json_line
    from testbed.live.figures import measured
    from testbed.runlog.reader import read_events

    lost = sorted({event["device"] for event in read_events(live.run_dir) if event["kind"] == "node_lost"})
    figures = measured(live, [answer.continuation for answer in answers])
    if not as_json:
        display = console()
        display.print(figures.line(), style="dim", soft_wrap=True)
        if lost:
            said = f"{', '.join(lost)} went away meanwhile: tokens went on without experts that nobody else holds"
            display.print(said, style="yellow", soft_wrap=True)
        display.print(f"{live.labels[0]}; every round: testbed logs show {live.run_dir}", style="dim", soft_wrap=True)
        return
    told = [
        {
            "prompt": answer.prompt,
            "text": answer.heard.text,
            "prompt_tokens": answer.continuation.prompt_tokens,
            "token_ids": answer.continuation.token_ids,
            "finish_reason": answer.continuation.finish_reason,
            "first_token_s": answer.continuation.first_token_s,
            "token_s": answer.continuation.step_s,
        }
        for answer in answers
    ]
    print_json_line(
        {
            "run": live.run_dir.name,
            "directory": str(live.run_dir),
            "policy": live.labels[0],
            "model": config.model.path,
            "answers": told,
            "nodes_lost": lost,
            **figures.document(),
        }
    )
