"""What commands on a live model are told on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from testbed.config import PolicySpec, RunConfig
from testbed.config.loading import apply_override, asked_policy, first_mistake
from testbed.errors import ConfigError

MAX_PROMPTS_BYTES = 2**24


def with_policy(config: RunConfig, asked: str | None) -> RunConfig:
    """The run file with one policy: its first one, or `asked`, such as wlr:theta=0.2 or my.module:Class:budget=0.1.

    Raises ConfigError.
    """
    if asked is None:
        return config.model_copy(update={"policies": config.policies[:1]})
    name, parameters = asked_policy(asked)
    table = {"name": name}
    try:
        for parameter in parameters:
            apply_override(table, parameter)
    except ConfigError:
        raise ConfigError(f"--policy {asked}: write NAME:KEY=VALUE,KEY=VALUE, such as wlr:theta=0.2") from None
    content = config.model_dump(mode="json", by_alias=True)
    content["policy"] = [{"name": "topk"}, *([] if table == {"name": "topk"} else [table])]
    try:
        checked = RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"--policy {asked}: {first_mistake(error)}") from error
    return checked.model_copy(update={"policies": checked.policies[-1:]})


def with_policies(config: RunConfig, asked: Sequence[str]) -> RunConfig:
    """The run file with the policies `asked` for, each as `with_policy` takes it; with all of its own if none is."""
    if not asked:
        return config
    policies = [with_policy(config, text).policies[0] for text in asked]
    return config.model_copy(update={"policies": tuple(policies)})


def policy_words(spec: PolicySpec) -> str:
    """As `with_policy` takes it: wlr:theta=0.2."""
    split = {"bandwidth": spec.bandwidth, "period": spec.period}
    given = spec.params | {key: value for key, value in split.items() if key in spec.model_fields_set}
    words = ",".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items())
    return f"{spec.name}:{words}" if words else spec.name


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; of a .jsonl file, the key `prompt` of each line. Raises ConfigError."""
    try:
        if file.stat().st_size > MAX_PROMPTS_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_PROMPTS_BYTES} bytes; cut it into several files")
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; name one with a prompt a line") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); name a file with a prompt a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    prompts = [_prompt_of(file, number, line) for number, line in enumerate(lines, 1)] if _is_jsonl(file) else lines
    if not prompts:
        raise ConfigError(f"{file}: holds no prompt; write one a line")
    return prompts


def _is_jsonl(file: Path) -> bool:
    return file.suffix == ".jsonl"


def _prompt_of(file: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f'{file}: line {number} must be an object such as {{"prompt": "def main("}}')
    return prompt
