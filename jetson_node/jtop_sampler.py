"""Prints the board's figures as JSON lines, in a process of its own. Not yet run on hardware."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from testbed.wire.figures import BOARD_INTERVAL_S, SUM_OF_RAILS

RETRY_S = 5.0


def sample_line(stats: Mapping[str, Any], power: Mapping[str, Any], sampled_ns: int) -> str:
    """One sample: when it was taken, on this machine's monotonic clock, the rail of its total power, and jtop's stats.

    jtop names the rail only where one carries the total, and adds rails up otherwise. None: the board has no power.
    """
    total = power.get("tot")
    rail = total.get("name", SUM_OF_RAILS) if isinstance(total, Mapping) and total else None
    plain = {name: value for name, value in stats.items() if isinstance(value, (int, float, str))}
    return json.dumps({"sampled_ns": sampled_ns, "total_rail": rail, "stats": plain})


def main() -> None:
    from jtop import JtopException, jtop  # noqa: PLC0415 - importing it changes multiprocessing's start method

    while True:
        try:
            with jtop(interval=BOARD_INTERVAL_S) as board:
                while board.ok():  # returns when there is a new sample
                    print(sample_line(board.stats, board.power, time.monotonic_ns()), flush=True)
        except BrokenPipeError:
            return  # the node is gone
        except JtopException as error:  # the service is not there, or was restarted
            print(f"jtop: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
