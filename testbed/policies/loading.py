"""From the run file's words to a policy: a built-in name, or "package.module:Class" for one of your own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from testbed.errors import ConfigError
from testbed.policies.base import Policy

BUILT_IN = {  # imported when asked for: their loops are compiled then
    "topk": "testbed.policies.topk:TopK",
    "wlr": "testbed.policies.wlr:WLR",
    "drop_late": "testbed.policies.drop_late:DropLate",
    "load_aware": "testbed.policies.load_aware:LoadAware",
    "joint": "testbed.policies.joint:Joint",
    "substitute": "testbed.policies.substitute:Substitute",
    "nearest_replica": "testbed.policies.nearest_replica:NearestReplica",
    "oracle": "testbed.policies.oracle:Oracle",
}
SYMBOLS = {"theta": "θ"}


def make_policy(name: str, params: Mapping[str, Any]) -> Policy:
    """The policy that `name` and `params` of the run file ask for. Raises ConfigError, always one line."""
    if ":" in name:
        policy_class = _import_class(name)
    elif name in BUILT_IN:
        policy_class = _import_class(BUILT_IN[name])
    else:
        raise ConfigError(
            f'no policy "{name}"{_nearest(name, BUILT_IN)}; built in: {", ".join(BUILT_IN)}; '
            'or write "package.module:Class" for your own'
        )
    _check_params(name, policy_class, params)
    try:
        policy = policy_class(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"policy {name} refuses {dict(params)}: {_one_line(error)}") from error
    missing = [attribute for attribute in ("name", "params") if not hasattr(policy, attribute)]
    if missing:
        raise ConfigError(f"policy {name} has no {' and no '.join(missing)}, which log and table call it by")
    return policy


def label(name: str, params: Mapping[str, Any], bandwidth: str = "even", period: str = "block") -> str:
    """What a table calls a policy, and how the band is shared out under it: "wlr θ=0.2 optimal/block"."""
    settings = [f"{SYMBOLS.get(key, key)}={value}" for key, value in params.items()]
    return " ".join([name, *settings, *([] if bandwidth == "even" else [f"{bandwidth}/{period}"])])


def _import_class(name: str) -> Callable[..., Policy]:
    module_name, _, class_name = name.partition(":")
    try:
        with _working_directory_on_path():
            module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"policy {name}: cannot import {module_name!r} from {Path.cwd()} or the installed packages "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"policy {name}: {module_name} has no class {class_name!r}{_nearest(class_name, classes)}")
    if not callable(getattr(found, "select", None)):
        raise ConfigError(f"policy {name} is no policy: it needs a method select(routing, state)")
    return cast("Callable[..., Policy]", found)


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    entry = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module itself may have changed the path
            sys.path.remove(entry)


def _check_params(name: str, policy_class: Callable[..., Policy], params: Mapping[str, Any]) -> None:
    accepted = inspect.signature(policy_class).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    allowed = [parameter.name for parameter in accepted if parameter.kind in named]
    for key in params:
        if key not in allowed:
            choices = f"allowed: {', '.join(allowed)}" if allowed else "it takes none"
            raise ConfigError(f'policy {name} has no parameter "{key}"{_nearest(key, allowed)}; {choices}')


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{match[0]}"?)' if match else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
