"""Which points a sweep has: axes over keys of a run file, and every combination of their values."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.config import RunConfig
from testbed.config.loading import apply_override, first_mistake, read_toml
from testbed.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

JOINED = "+"  # keys that move together: "wire.down+wire.up"
MOST_POINTS = 10_000
EXAMPLE = "such as radio.bandwidth_hz=50e6,100e6"

Axes = dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Point:
    """One place in the grid: a value per axis, and the run file with them in it."""

    axes: Mapping[str, Any]
    config: RunConfig

    def __str__(self) -> str:
        return at(self.axes)


@dataclass(frozen=True, slots=True)
class Grid:
    """The run file by itself, the axes with their values, and the points, the last axis moving fastest."""

    base: RunConfig
    axes: Axes
    points: list[Point]


def load_grid(path: Path, overrides: Sequence[str] = (), axes: Sequence[str] = ()) -> Grid:
    """Read a run file and its table [sweep]; `overrides` and `axes` are those of the command line (KEY=VALUE, KEY=V,V).

    An axis of the command line replaces the table's of the same name. Every point is checked before any is run.
    Raises ConfigError, one line.
    """
    content = read_toml(path)
    table = content.pop("sweep", {})
    for override in overrides:
        apply_override(content, override)
    asked = _checked_axes(path, table) | dict(_read_axis(text) for text in axes)
    if not asked:
        raise ConfigError(f"{path}: nothing to vary; add a table [sweep] or --axis KEY=V1,V2, {EXAMPLE}")
    _refuse_keys_named_twice(path, asked)
    if (points := math.prod(len(values) for values in asked.values())) > MOST_POINTS:
        raise ConfigError(f"{path}: {points} points are more than {MOST_POINTS}; give the axes fewer values")
    combinations = (dict(zip(asked, values, strict=True)) for values in itertools.product(*asked.values()))
    base = _config(f"{path}: ", content)
    return Grid(base, asked, [_point(path, content, values) for values in combinations])


def at(axes: Mapping[str, Any]) -> str:
    """Where in the grid, for people: "wire.down=int8 radio.bandwidth_hz=5e+07"."""
    return " ".join(f"{axis}={shown(value)}" for axis, value in axes.items())


def shown(value: Any) -> str:
    """A value of an axis for people: 5e+07 rather than 50000000.0, text without quotes."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _checked_axes(path: Path, table: Any) -> Axes:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: sweep: must be a table of axes; write [sweep]")
    for axis, values in table.items():
        if isinstance(values, dict):
            raise ConfigError(f'{path}: sweep.{axis}: is a table; write a dotted key in quotes, "{axis}.KEY" = [...]')
        if not isinstance(values, list):
            raise ConfigError(f"{path}: sweep.{axis}: must be a list of values")
        _check_values(f"{path}: sweep.{axis}", values)
    return dict(table)


def _read_axis(text: str) -> tuple[str, list[Any]]:
    """KEY=V1,V2: values as TOML writes them; text needs no quotes."""
    axis, separator, listed = text.partition("=")
    if not separator or not axis.strip() or not text.isprintable():
        raise ConfigError(f"--axis {text!r}: write KEY=V1,V2,..., {EXAMPLE}")
    values: list[Any] | None = _toml_list(listed)
    if values is None:
        values = [(_toml_list(word) or [word])[0] for word in map(str.strip, listed.split(","))]
    _check_values(f"--axis {axis.strip()}", values)
    return axis.strip(), values


def _toml_list(text: str) -> list[Any] | None:
    try:
        parsed = tomllib.loads(f"values = [{text}]")
    except (ValueError, RecursionError):  # not TOML
        return None
    return parsed["values"] if parsed.keys() == {"values"} else None


def _check_values(where: str, values: list[Any]) -> None:
    if not values or "" in values:
        raise ConfigError(f"{where}: has an empty value; write values with commas between them, {EXAMPLE}")
    try:
        texts = [json.dumps(value, allow_nan=False) for value in values]
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: a value must be text, a finite number, true, false or a list of them") from None
    if any("{" in json.dumps(value) for value in values if not isinstance(value, str)):
        raise ConfigError(f"{where}: a value must not be a table; name the key inside it")
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{where}: {text} stands there {count} times; once is enough")


def _refuse_keys_named_twice(path: Path, axes: Axes) -> None:
    key, count = Counter(key for axis in axes for key in _keys(axis)).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{path}: {key} is moved by {count} axes; name it in one of them")


def _keys(axis: str) -> list[str]:
    return [key.strip() for key in axis.split(JOINED)]


def _point(path: Path, content: dict[str, Any], axes: dict[str, Any]) -> Point:
    varied = copy.deepcopy(content)
    for axis, value in axes.items():
        _move(path, varied, axis, value)
    return Point(axes, _config(f"{path} with {at(axes)}: ", varied))


def _move(path: Path, content: dict[str, Any], axis: str, value: Any) -> None:
    try:
        for key in _keys(axis):
            apply_override(content, f"{key}={json.dumps(value)}")
    except ConfigError as error:
        raise ConfigError(f"{path}: axis {axis}: {str(error).removeprefix('--set ')}") from None


def _config(where: str, content: dict[str, Any]) -> RunConfig:
    """Check a run file's content, and that its policies can be made."""
    from testbed.policies.loading import make_policy  # noqa: PLC0415  (numba; only a grid that is otherwise right)

    try:
        config = RunConfig.model_validate(content)
        for spec in config.policies:
            make_policy(spec.name, spec.params)
    except ValidationError as error:
        raise ConfigError(where + first_mistake(error)) from error
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    return config
