"""`testbed run --inventory`: the run file for the boards, and what the boards say before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.config import RunConfig
    from testbed.fleet.boards import OnBoards

Load = Callable[[Sequence[str]], "RunConfig"]
Ask = Callable[["Console"], "OnBoards"]


def prepare(file: Path, inventory: Path) -> tuple[Load, Ask]:
    """How to load the run file for the inventory's boards, and how to ask them. Raises ConfigError."""
    from testbed.fleet.boards import OnBoards, examined
    from testbed.fleet.inventory import read_inventory
    from testbed.fleet.on_inventory import left_out, load_on_inventory

    rack = read_inventory(inventory)

    def load(overrides: Sequence[str]) -> RunConfig:
        return load_on_inventory(file, overrides, rack)

    def ask(display: Console) -> OnBoards:
        if dropped := left_out(file):
            display.print(
                f"{file}: {', '.join(dropped)} left out: a board's links and speed are its own", soft_wrap=True
            )
        boards = dict(examined(rack.boards))
        for name, facts in boards.items():
            if facts["error"]:
                display.print(f"warning: {name}: {facts['error']}", soft_wrap=True)
        return OnBoards(rack.links, boards)

    return load, ask
