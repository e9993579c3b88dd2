"""What commands print: tables for people, one line of JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160  # in a pipe or file there is no edge to wrap at


def console(*, stderr: bool = False) -> Console:
    """A console that honours NO_COLOR and writes plain, unwrapped text where nobody watches."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column names the row and whose others are figures."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def print_json_line(document: Mapping[str, Any]) -> None:
    """Print one JSON document as one line. What is unknown (NaN) becomes null; an infinity is refused (ValueError)."""
    print(json.dumps(_nan_to_none(document), allow_nan=False, ensure_ascii=False), flush=True)


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(item) for item in value]
    return value
