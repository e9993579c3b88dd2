"""Prints the board's figures as JSON lines, in a process of its own. Not yet run on hardware."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from testbed.wire.figures import BOARD_INTERVAL_S, SUM_OF_RAILS

RETRY_S = 5.0


def sample_line(
    stats: Mapping[str, Any], power: Mapping[str, Any], clocks: Mapping[str, float], sampled_ns: int
) -> str:
    """One sample: when it was taken, on this machine's monotonic clock, the rail of its total power, jtop's stats, and
    what `clocks_of` found.

    jtop names the rail only where one carries the total, and adds rails up otherwise. None: the board has no power.
    """
    total = power.get("tot")
    rail = total.get("name", SUM_OF_RAILS) if isinstance(total, Mapping) and total else None
    plain = {name: value for name, value in stats.items() if isinstance(value, (int, float, str))}
    return json.dumps({"sampled_ns": sampled_ns, "total_rail": rail, "stats": plain, "clocks": dict(clocks)})


def clocks_of(gpu: Any, memory: Any, fan: Any) -> dict[str, float]:
    """`Clock GPU` and `Clock EMC` in kHz, and the fans' `Fan NAME rpm`, as jtop's properties of these names have them.

    Not in jtop's stats. What a board or a version of jtop does not tell, or tells in another form, is left out.
    """
    found = {"Clock GPU": _at(_first(gpu), "freq", "cur"), "Clock EMC": _at(memory, "EMC", "cur")}
    for name in _keys(fan):
        rpm = _at(fan, name, "rpm")
        for place, value in enumerate(rpm if isinstance(rpm, list) else ()):
            found[f"Fan {name}{place} rpm"] = value
    return {name: value for name, value in found.items() if type(value) in (int, float)}


def _first(gpus: Any) -> Any:
    return next((_at(gpus, name) for name in _keys(gpus)), None)


def _keys(of: Any) -> Iterable[Any]:
    try:
        return list(of.keys())
    except AttributeError:
        return ()


def _at(tree: Any, *path: Any) -> Any:
    """jtop's properties look like dicts but are classes of its own."""
    try:
        for key in path:
            tree = tree[key]
    except (KeyError, TypeError, IndexError):
        return None
    return tree


def main() -> None:
    from jtop import JtopException, jtop  # noqa: PLC0415 - importing it changes multiprocessing's start method

    while True:
        try:
            with jtop(interval=BOARD_INTERVAL_S) as board:
                while board.ok():  # returns when there is a new sample
                    clocks = clocks_of(board.gpu, board.memory, board.fan)
                    print(sample_line(board.stats, board.power, clocks, time.monotonic_ns()), flush=True)
        except BrokenPipeError:
            return  # the node is gone
        except JtopException as error:  # the service is not there, or was restarted
            print(f"jtop: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
