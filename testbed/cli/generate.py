"""`testbed generate`: continue prompts with the experts on the nodes, and say how long it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from testbed.config import RunConfig
    from testbed.live.engine import Continuation
    from testbed.live.figures import Figures
    from testbed.live.model import LiveModel

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
        done, figures = _generate(live, texts, sampling, batch, embed_locally=embed_locally, quiet=as_json)
        _report(live, config, texts, done, figures, as_json=as_json)


def _generate(
    live: LiveModel, texts: list[str], sampling: Any, batch: int, *, embed_locally: bool, quiet: bool
) -> tuple[list[Continuation], Figures]:
    """A lone prompt is shown as its tokens come, of several each one when those before it are done."""
    from testbed.live.engine import Continuation, Engine
    from testbed.live.figures import measured
    from testbed.live.prompting import UserSide, token_ids_of
    from testbed.live.text import TextStream

    engine, shown = Engine(live, batch), TextStream(live.tokenizer)
    user = UserSide(live) if embed_locally else None

    def tell(token_id: int | None) -> None:
        print(shown.rest() + "\n" if token_id is None else shown.add(token_id), end="", flush=True)

    streamed = len(texts) == 1 and not quiet
    done: list[Continuation] = []
    for text in texts:
        given = token_ids_of(live.tokenizer, text) if user is None else user.embed(text)
        done.append(Continuation(given, sampling, *([tell] if streamed else [])))
        engine.submit(done[-1])
    if streamed:
        print(texts[0], end="", flush=True)
    printed = 0
    while engine.step():
        while not (streamed or quiet) and printed < len(done) and done[printed].finish_reason:
            print(f"[{printed}] {texts[printed]}{_text(live, done[printed])}", flush=True)
            printed += 1
    return done, measured(live, done)


def _text(live: LiveModel, continuation: Continuation) -> str:
    text: str = live.tokenizer.decode(continuation.token_ids, skip_special_tokens=True)
    return text


def _report(
    live: LiveModel, config: RunConfig, texts: list[str], done: list[Continuation], figures: Figures, *, as_json: bool
) -> None:
    from testbed.cli.output import console, print_json_line

    if not as_json:
        display = console()
        display.print(figures.line(), style="dim", soft_wrap=True)
        display.print(f"{live.labels[0]}; every round: testbed logs show {live.run_dir}", style="dim", soft_wrap=True)
        return
    answers = [
        {
            "prompt": text,
            "text": _text(live, continuation),
            "prompt_tokens": continuation.prompt_tokens,
            "token_ids": continuation.token_ids,
            "finish_reason": continuation.finish_reason,
            "first_token_s": continuation.first_token_s,
            "token_s": continuation.step_s,
        }
        for text, continuation in zip(texts, done, strict=True)
    ]
    print_json_line(
        {
            "run": live.run_dir.name,
            "directory": str(live.run_dir),
            "policy": live.labels[0],
            "model": config.model.path,
            "answers": answers,
            **figures.document(),
        }
    )
