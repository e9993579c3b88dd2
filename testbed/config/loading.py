"""Read a run file. Whatever is wrong with it becomes one line: file, dotted key, what is wrong, what to do."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from testbed.config.sections import RunConfig
from testbed.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Key = tuple[int | str, ...]
MAX_SHOWN = 60


def load_run_file(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file (TOML). Each override is KEY=VALUE: a dotted key, and a value as TOML writes it.

    Raises ConfigError, with the first thing that is wrong and how many more there are.
    """
    try:
        content = read_toml(path)
        for override in overrides:
            apply_override(content, override)
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_mistake(error)}") from error


def read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        others = [str(other) for other in sorted(path.parent.glob("*.toml"))]
        raise ConfigError(f"{path}: no such file; {_offer(str(path), others, 'name an existing run file')}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a run file (TOML)") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); name a run file (TOML)") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}; mend that line") from error
    except ValueError as error:  # a number with thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error!s:.80}; mend that value") from error
    except RecursionError:
        raise ConfigError(
            f"{path}: not valid TOML: nested too deeply; a run file has tables in tables, no more"
        ) from None


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one key of the file's content. Text needs no quotes. A list's entry is reached by its number."""
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys) or not override.isprintable():
        shown = override if override.isprintable() else repr(override[:60])
        raise ConfigError(f"--set {shown}: write KEY=VALUE, such as radio.placement.seed=2")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not TOML
        parsed = {}
    value = parsed["value"] if parsed.keys() == {"value"} else text.strip()
    table: Any = content
    for key in keys[:-1]:
        try:
            table = (
                table[int(key) if key.isdecimal() else len(table)]
                if isinstance(table, list)
                else table.setdefault(key, {})
            )
        except IndexError:
            raise ConfigError(f"--set {override}: there is no {key} in a list of {len(table)}") from None
        if not isinstance(table, (dict, list)):
            raise ConfigError(f"--set {override}: {key} is a value, not a table")
    if isinstance(table, list):
        raise ConfigError(
            f"--set {override}: name a key of one of its entries, such as {dotted.rpartition('.')[0]}.0.KEY"
        )
    table[keys[-1]] = value


def first_mistake(error: ValidationError) -> str:
    """The first problem as `key: what is wrong`. A wrong name comes first: the missing key is often the same one."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    key = f"{_dotted(first['loc'])}: " if first["loc"] else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return key + _what_is_wrong(first) + more


def _what_is_wrong(problem: ErrorDetails) -> str:
    kind, value, name = problem["type"], problem["input"], str(problem["loc"][-1]) if problem["loc"] else ""
    if kind == "extra_forbidden":
        known = known_keys(problem["loc"][:-1])
        return f"unknown key; {_offer(name, known, 'known here are ' + ', '.join(known))}"
    if kind == "missing":
        return f"missing; {_offer(name, list(value), 'add it', by=True)}"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "tuple_type":
        return (
            f"must be a list; write [[{name}]]" if isinstance(value, dict) else f"must be a list, not {_shown(value)}"
        )
    if kind in ("model_type", "dict_type"):
        return f"must be a table of keys, not {_shown(value)}"
    if kind == "path_type":
        return f"must be a path as text, not {_shown(value)}"
    return f"{problem['msg'].replace('Input should be', 'must be')}, not {_shown(value)}"


def known_keys(key: Key) -> list[str]:
    """The keys that may stand in the table at `key`; a list's index changes nothing."""
    model: type[BaseModel] = RunConfig
    for part in key:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _model_in(fields[part].annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel]:
    """The section in an annotation such as tuple[DeviceSection, ...]."""
    while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        annotation = get_args(annotation)[0]
    return annotation


def _offer(name: str, candidates: Sequence[str], otherwise: str, *, by: bool = False) -> str:
    near = difflib.get_close_matches(name, candidates, n=1)
    if not near:
        return otherwise
    return f"did you write {json.dumps(near[0])} for it?" if by else f"did you mean {json.dumps(near[0])}?"


def _dotted(key: Key) -> str:
    """("device", 2, "threads") -> device[2].threads; a name that TOML would quote is quoted."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += "." * bool(text) + (part if re.fullmatch(r"[\w-]+", part) else json.dumps(part))
    return text


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def asked_policy(text: str) -> tuple[str, list[str]]:
    """A policy as the command line names it, and its KEY=VALUEs: wlr:theta=0.2, my.module:Class:budget=0.1,k=2."""
    name, separator, given = text.rpartition(":")
    return (name, given.split(",")) if separator and "=" in given else (text, [])
