"""What the row codec costs beside a copy of the same rows: `python benchmarks/codec.py`.

One thread, rows of 4096. Every repeat times each step once, in turn with a float32 memcpy of the same rows, so that a
busy machine slows all of them alike; figures are medians over the repeats. Prints a table of ratios; the last line of
stdout is one JSON document. Goals: quantise 4x and dequantise 1.5x the memcpy, int8 at 16 rows.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from testbed.wire.kept import KeptRows
from testbed.wire.quantization import SCHEMES, Scheme, accumulate, dequantise, quantise

WIDTH = 4096
ROWS = (1, 16, 128, 1024)
STEPS = ("quantise", "gather", "dequantise", "accumulate")
GOALS_RATIO = {"quantise": 4.0, "dequantise": 1.5}
Step = Callable[[], object]


def medians_us(steps: dict[str, Step], seconds: float = 1.0) -> dict[str, float]:
    """Median microseconds of each step; the steps take turns."""
    durations_ns: dict[str, list[int]] = {name: [] for name in steps}
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)
    while time.perf_counter_ns() < end_ns:
        for name, step in steps.items():
            begin_ns = time.perf_counter_ns()
            step()
            durations_ns[name].append(time.perf_counter_ns() - begin_ns)
    return {name: statistics.median(values_ns) / 1000 for name, values_ns in durations_ns.items()}


def codec_steps(rows: int, scheme: Scheme) -> dict[str, Step]:
    rng = np.random.default_rng(rows)
    hidden_RD = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    out_RD, weight_R, row_index_R = np.zeros_like(hidden_RD), np.full(rows, 0.5, np.float32), rng.permutation(rows)
    room, rows_RB = KeptRows(np.uint8), quantise(hidden_RD, scheme)
    payload_RB = np.empty_like(rows_RB)
    payload = rows_RB.tobytes()
    return {
        "memcpy": lambda: np.copyto(out_RD, hidden_RD),
        "quantise": lambda: quantise(hidden_RD, scheme, room),
        "gather": lambda: np.take(rows_RB, row_index_R, 0, payload_RB, "clip"),
        "dequantise": lambda: dequantise(payload, rows, WIDTH, scheme, out_RD),
        "accumulate": lambda: accumulate(hidden_RD, weight_R, row_index_R, out_RD),
    }


def measured(rows: int, scheme: Scheme) -> dict[str, float]:
    cost_us = medians_us(codec_steps(rows, scheme))
    memcpy_us = cost_us.pop("memcpy")
    ratios = {f"{step}_memcpy_ratio": round(step_us / memcpy_us, 2) for step, step_us in cost_us.items()}
    return {f"{step}_us": round(step_us, 2) for step, step_us in cost_us.items()} | {"memcpy_us": memcpy_us} | ratios


def main() -> None:
    result: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'scheme':8}{'rows':>6}{'memcpy':>11}" + "".join(f"{step:>19}" for step in STEPS))
    for scheme in SCHEMES.values():
        result[scheme.name] = {}
        for rows in ROWS:
            costs = result[scheme.name][str(rows)] = measured(rows, scheme)
            cells = (f"{costs[f'{step}_us']:9.1f} us {costs[f'{step}_memcpy_ratio']:5.2f}x" for step in STEPS)
            print(f"{scheme.name:8}{rows:6}{costs['memcpy_us']:8.1f} us" + "".join(cells))
    for step, goal in GOALS_RATIO.items():
        print(f"int8, 16 rows: {step} {result['int8']['16'][f'{step}_memcpy_ratio']}x memcpy, goal {goal}x")
    print(json.dumps({"width": WIDTH, "schemes": result}))


if __name__ == "__main__":
    main()
