"""Prints the board's figures as JSON lines, in a process of its own. Not yet run on hardware."""

from __future__ import annotations

import json
import sys
import time

INTERVAL_S = 1.0
RETRY_S = 5.0


def main() -> None:
    from jtop import JtopException, jtop  # noqa: PLC0415 - importing it changes multiprocessing's start method

    while True:
        try:
            with jtop(interval=INTERVAL_S) as board:
                while board.ok():
                    plain = {k: v for k, v in board.stats.items() if isinstance(v, (int, float, str))}
                    print(json.dumps(plain), flush=True)
        except BrokenPipeError:
            return  # the node is gone
        except JtopException as error:  # the service is not there, or was restarted
            print(f"jtop: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
